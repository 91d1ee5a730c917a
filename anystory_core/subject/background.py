"""Which part of a picture is background, where nobody gave a mask."""

from __future__ import annotations

import torch
from torch import Tensor

_BACKGROUND_TOLERANCE = 0.06  # colour distance to a plain background that still belongs to it
_PLAIN_SPREAD = 0.03  # largest spread of the border's colours that counts as one plain colour


def _border(x: Tensor) -> Tensor:
    """(V,H,W,...) -> (V, border pixels, ...), corners twice."""
    return torch.cat((x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]), dim=1)


def border_share(mask: Tensor) -> float:
    return float((_border(mask) > 0.5).float().mean())


def guess_mask(rgb: Tensor) -> tuple[Tensor, str]:
    """Without a mask: all that differs from a plain background, else the whole picture."""
    border = _border(rgb)  # (V,P,3)
    colour = border.median(dim=1).values  # (V,3)
    plain = (border - colour[:, None]).abs().amax(-1).quantile(0.95, dim=1) < _PLAIN_SPREAD
    distance = (rgb - colour[:, None, None]).abs().amax(-1)
    mask = (distance > _BACKGROUND_TOLERANCE).float()
    if bool(plain.all()) and bool(mask.flatten(1).any(dim=1).all()):
        return mask, "No mask: the plain background was cut away by its colour."
    return torch.ones_like(mask), "No mask: the whole picture is taken as the subject."
