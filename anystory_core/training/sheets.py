"""Picture sheets of a running training: what the present weights draw for fixed samples."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..injection.rows import Rows
from ..tensor_files import atomic_file
from .batches import Batch
from .cache import Encodings
from .call import TrainingCall
from .checkpoints import writing
from .hosts.unet import UNetInputs, time_ids
from .schedule import Schedule, ddim
from .stages import Stage

GUIDANCE = 5.0
ROWS = 4
_LINE = 14  # pixels of a caption's line
_COLOURS = ((230, 60, 60), (60, 120, 240), (60, 190, 90), (240, 190, 40), (170, 80, 210))


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
    device, (height, width) = batch.target.device, batch.target.shape[-2:]
    count = len(batch.numbers)
    text, pooled = encodings.text(batch, device)
    empty, empty_pooled = stage.frozen.text([""] * count)
    dtype = stage.frozen.unet.dtype
    generator = torch.Generator().manual_seed(seed)
    stride = stage.frozen.config.reference.latent_stride
    channels = stage.frozen.config.unet.in_channels
    shape = (count, channels, height // stride, width // stride)
    noise = torch.randn(shape, generator=generator).to(device)
    call = stage.conditions(batch, ())
    ids = time_ids(height, width, count, device)

    def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal call
        row_times = t.expand(count)
        call = _fresh(call, Rows(tuple(range(count))))
        plain = _fresh(call, Rows((), tuple(range(count))))
        seen = z.to(dtype)
        cond = UNetInputs(seen, row_times, text.to(dtype), pooled.to(dtype), ids)
        rest = UNetInputs(seen, row_times, empty.to(dtype), empty_pooled.to(dtype), ids)
        return stage.predict(call, cond).float(), stage.predict(plain, rest).float()

    schedule = Schedule(stage.frozen.prediction)
    z = ddim(noise, predict, steps=steps, guidance=guidance, schedule=schedule)
    return stage.frozen.decode_picture(z), call


def _fresh(call: TrainingCall, rows: Rows) -> TrainingCall:
    """A call of the same prepared subjects for another forward pass over ``rows``."""
    return TrainingCall(call.prepared, rows, call.factors, call.sites, call.attention)


def draw_sheet(stage: Stage, batch: Batch, encodings: Encodings) -> Image.Image:
    """A row for each sample, its caption below: its references, the target with the true masks in
    colours, what is drawn, and in stage 2 the last block's routing map of each subject."""
    pictures, call = sample(stage, batch, encodings, steps=stage.config.run.sheet_steps)
    size = (batch.target.shape[-2], batch.target.shape[-1])
    columns = [_fitted(batch.vae[:, i], size) for i in range(batch.vae.shape[1])]
    columns += [_coloured(batch.target, batch.masks), pictures]
    soft = call.soft_maps.get(len(call.sites))
    if soft is not None and stage.config.router is not None:
        maps = soft.maps.reshape(*soft.maps.shape[:2], *soft.grid)[:, :-1]
        for i in range(maps.shape[1]):
            grey = torch.nn.functional.interpolate(maps[:, i : i + 1].float(), size) * 2 - 1
            columns.append(grey.expand(-1, 3, -1, -1))
    rows = torch.cat([c.float().cpu() for c in columns], dim=-1)  # (B,3,H,columns*W)
    pixels = ((rows.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
    pieces = [
        _captioned(cast(Any, row).numpy(), caption)
        for row, caption in zip(pixels, batch.captions, strict=True)
    ]
    return _stacked(pieces)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG. CheckpointFolderError when it cannot be written."""
    with writing("run.folder", "a picture sheet", path.parent), atomic_file(path) as temporary:
        sheet.save(temporary, "PNG")


def _fitted(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Square pictures (B,3,R,R), inside a frame of ``size`` as large as fits, in the middle."""
    height, width = size
    side = min(size)
    inner = torch.nn.functional.interpolate(pictures, (side, side))
    left, top = (width - side) // 2, (height - side) // 2
    edges = (left, width - side - left, top, height - side - top)
    return torch.nn.functional.pad(inner, edges)


def _coloured(pictures: Tensor, masks: Tensor) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] with each mask (B,N,H,W) as a veil of its colour."""
    out = pictures.float()
    for i in range(masks.shape[1]):
        colour = torch.tensor(_COLOURS[i % len(_COLOURS)], device=out.device) / 127.5 - 1
        veil = 0.4 * masks[:, i : i + 1].float()
        out = out * (1 - veil) + colour[:, None, None] * veil
    return out


def _captioned(row: Any, caption: str) -> Image.Image:
    """A row (H,W,3) uint8 with its caption below."""
    picture = Image.fromarray(np.ascontiguousarray(row))
    lines = textwrap.wrap(caption, max(8, picture.width // 7))[:3] or ["(no caption)"]
    canvas = Image.new("RGB", (picture.width, picture.height + _LINE * len(lines) + 4))
    canvas.paste(picture, (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_LINE - 3)
    for i, line in enumerate(lines):
        draw.text((3, picture.height + 1 + i * _LINE), line, fill=(235, 235, 235), font=font)
    return canvas


def _stacked(pieces: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(p.width for p in pieces), sum(p.height for p in pieces)))
    top = 0
    for piece in pieces:
        sheet.paste(piece, (0, top))
        top += piece.height
    return sheet
