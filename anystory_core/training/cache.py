"""What the frozen base makes of a batch, on disk: computed at the first epoch, read at the others.

Text states by caption, target latents by their pixels; where references are not augmented, their
latents and CLIP states too. One small safetensors file each, named by what it was made from, so
another base, precision, caption or picture never reads a stale one. Processes may share the folder.
What was encoded ahead of training lies in shards beside them (:mod:`.packed`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..tensor_files import read_tensors, save_tensors
from .batches import Batch
from .checkpoints import writing
from .config import TrainingConfig
from .hosts.frozen import FrozenNetworks
from .packed import PACKED, PackedEncodings


def text_name(caption: str) -> str:
    """What a caption's states are named by."""
    return f"text|{caption}"


def pixels_name(kind: str, pixels: Tensor) -> str:
    """What an encoding of a picture (3,H,W) is named by; ``kind``: "latents" or "clip"."""
    data = pixels.detach().float().cpu().numpy()
    return f"{kind}|{hashlib.sha256(data.tobytes()).hexdigest()}"


def digest_of(name: str) -> str:
    """The file of an encoding."""
    return hashlib.sha256(name.encode()).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """What the frozen networks make of a batch: its targets as latents (B,4,h,w) at U-Net scale, in
    float32; the captions' states text (B,77,C) and pooled (B,P), and time_ids (B,6), as the U-Net
    reads them."""

    latents: Tensor
    text: Tensor
    pooled: Tensor
    time_ids: Tensor


class Encodings:
    """Encodes a batch's captions and targets with the base, through a folder when there is one."""

    def __init__(self, frozen: FrozenNetworks, config: TrainingConfig) -> None:
        self.frozen = frozen
        folder, augmented = config.data.cache, config.augment.changes
        precision = str(frozen.unet.dtype).removeprefix("torch.")
        reference = frozen.config.reference  # latents are kept at the U-Net's scale
        scale = f"{reference.latent_scale:g}-{reference.latent_shift:g}"
        name = f"{frozen.fingerprint}-{scale}-{precision}"
        self.folder = Path(folder) / name if folder else None
        self.keeps_references = self.folder is not None and not augmented

    @cached_property
    def _packed(self) -> PackedEncodings:
        """What was encoded ahead of training."""
        assert self.folder is not None
        return PackedEncodings(self.folder / PACKED)

    def encode(self, batch: Batch) -> Encoded:
        """Targets and captions of a batch, on the device that it lies on."""
        device, dtype = batch.target.device, self.frozen.unet.dtype
        text, pooled = self.text(batch, device)
        latents = self.latents(batch, device).float()
        return Encoded(latents, text.to(dtype), pooled.to(dtype), batch.time_ids)

    def text(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """States (B,77,C) and pooled (B,P) of the captions."""

        def compute(missing: Sequence[int]) -> list[dict[str, Tensor]]:
            states, pooled = self.frozen.text([batch.captions[i] for i in missing])
            return [{"states": s, "pooled": p} for s, p in zip(states, pooled, strict=True)]

        rows = self._rows([text_name(c) for c in batch.captions], compute)
        return _stack(rows, "states", device), _stack(rows, "pooled", device)

    def latents(self, batch: Batch, device: torch.device) -> Tensor:
        """Targets as latents (B,4,h,w) at U-Net scale."""
        encode = self.frozen.encode_picture
        return self._of_pixels("latents", batch.target, encode, keep=True).to(device)

    def reference_latents(self, pixels: Tensor) -> Tensor:
        """References (M,3,R,R) in [-1,1] as latents (M,4,h,w) at U-Net scale."""
        encode, keep = self.frozen.encode_picture, self.keeps_references
        return self._of_pixels("latents", pixels, encode, keep=keep)

    def clip_states(self, pixels: Tensor) -> Tensor:
        """Penultimate CLIP states (M,S,W) of normalised pixels (M,3,S,S)."""
        return self._of_pixels("clip", pixels, self.frozen.clip_states, keep=self.keeps_references)

    def _of_pixels(
        self, kind: str, pixels: Tensor, encode: Callable[[Tensor], Tensor], *, keep: bool
    ) -> Tensor:
        if self.folder is None or not keep:
            return encode(pixels)

        def compute(missing: Sequence[int]) -> list[dict[str, Tensor]]:
            return [{kind: x} for x in encode(pixels[list(missing)])]

        names = [pixels_name(kind, row) for row in pixels]
        return _stack(self._rows(names, compute), kind, pixels.device)

    def _rows(
        self,
        names: Sequence[str],
        compute: Callable[[Sequence[int]], list[dict[str, Tensor]]],
    ) -> list[dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = {}
        for i, name in enumerate(names):
            stored = self._read(name)
            if stored is not None:
                found[i] = stored
        missing = [i for i in range(len(names)) if i not in found]
        if missing:
            for i, row in zip(missing, compute(missing), strict=True):
                found[i] = row
                self._write(names[i], row)
        return [found[i] for i in range(len(names))]

    def _path(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        digest = digest_of(name)
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def _read(self, name: str) -> dict[str, Tensor] | None:
        path = self._path(name)
        if path is None:
            return None
        packed = self._packed.read(path.stem)
        if packed is not None:
            return packed
        with contextlib.suppress(OSError, SafetensorError):
            return read_tensors(path)
        return None

    def _write(self, name: str, row: dict[str, Tensor]) -> None:
        path = self._path(name)
        if path is None:
            return
        tensors = {k: v.detach().cpu().contiguous() for k, v in row.items()}
        with writing("data.cache", "an encoding", path.parents[1]):
            save_tensors(path, tensors, {})


def _stack(rows: Sequence[dict[str, Tensor]], name: str, device: torch.device) -> Tensor:
    return torch.stack([row[name].to(device) for row in rows])
