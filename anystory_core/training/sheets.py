"""Picture sheets of a running training: reference, target, sample and routing maps, a row each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ..injection.rows import Rows
from ..tensor_files import atomic_file
from .batches import Batch
from .cache import Encodings
from .call import TrainingCall
from .checkpoints import writing
from .hosts.unet import UNetInputs, time_ids
from .schedule import ddim
from .stages import Stage

GUIDANCE = 5.0


@torch.no_grad()
def sample(
    stage: Stage,
    batch: Batch,
    encodings: Encodings,
    *,
    steps: int,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> tuple[Tensor, TrainingCall]:
    """Draw a picture for each row with deterministic DDIM and classifier-free guidance:
    ((B,3,H,W) in [-1,1], the last conditional call with its routing maps).

    Unconditional rows get the background embedding and no references, as in the nodes."""
    device, size = batch.target.device, stage.config.data.resolution
    count = len(batch.numbers)
    text, pooled = encodings.text(batch, device)
    empty, empty_pooled = stage.frozen.text([""] * count)
    dtype = stage.frozen.unet.dtype
    generator = torch.Generator().manual_seed(seed)
    side = size // stage.frozen.config.reference.latent_stride
    channels = stage.frozen.config.unet.in_channels
    noise = torch.randn(count, channels, side, side, generator=generator).to(device)
    call = stage.conditions(batch, ())
    ids = time_ids(size, size, count, device)

    def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal call
        row_times = t.expand(count)
        call = _fresh(call, Rows(tuple(range(count))))
        plain = _fresh(call, Rows((), tuple(range(count))))
        seen = z.to(dtype)
        cond = UNetInputs(seen, row_times, text.to(dtype), pooled.to(dtype), ids)
        rest = UNetInputs(seen, row_times, empty.to(dtype), empty_pooled.to(dtype), ids)
        return stage.predict(call, cond).float(), stage.predict(plain, rest).float()

    z = ddim(noise, predict, steps=steps, guidance=guidance)
    return stage.frozen.decode_picture(z), call


def _fresh(call: TrainingCall, rows: Rows) -> TrainingCall:
    """A call of the same prepared subjects for another forward pass over ``rows``."""
    return TrainingCall(call.prepared, rows, call.factors, call.sites, call.attention)


def draw_sheet(stage: Stage, batch: Batch, encodings: Encodings, path: Path) -> None:
    """Write a PNG: each row shows the first reference, the target, a sample, and the last block's
    routing map of every subject."""
    pictures, call = sample(stage, batch, encodings, steps=stage.config.run.sheet_steps)
    size = batch.target.shape[-1]
    resize = torch.nn.functional.interpolate
    columns = [resize(batch.vae[:, 0], (size, size)), batch.target, pictures]
    soft = call.soft_maps.get(len(call.sites))
    if soft is not None:
        maps = soft.maps.reshape(*soft.maps.shape[:2], *soft.grid)[:, :-1]
        for i in range(maps.shape[1]):
            grey = resize(maps[:, i : i + 1], (size, size)) * 2 - 1
            columns.append(grey.expand(-1, 3, -1, -1))
    rows = torch.cat([c.float().cpu() for c in columns], dim=-1)  # (B,3,H,columns*W)
    sheet = torch.cat(list(rows), dim=1)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1)
    picture = Image.fromarray(cast(Any, pixels).contiguous().numpy())
    with writing("run.folder", "a picture sheet", path.parent), atomic_file(path) as temporary:
        picture.save(temporary, "PNG")
