"""The user's masks: what they must be, and which subject gets no place by them.

A mask is (H,W) for all pictures of a batch, or (M,H,W) with one for each; in [0,1], 1 = subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import RoutingError


def count_of(mask: Tensor) -> int:
    """How many pictures have a mask of their own in it; 1 where all share it."""
    return 1 if mask.ndim == 2 else mask.shape[0]


def mask_of(mask: Tensor, picture: int) -> Tensor:
    """(H,W) of one picture."""
    if mask.ndim == 2:
        return mask
    return mask[picture if mask.shape[0] > 1 else 0]


def check_counts(masks: Sequence[Tensor | None]) -> None:
    """RoutingError where two subjects have masks for different numbers of pictures."""
    counts = {count_of(mask) for mask in masks if mask is not None} - {1}
    if len(counts) > 1:
        raise RoutingError(
            f"masks: one subject has {min(counts)} masks and another {max(counts)}; give each "
            "subject one mask for all pictures, or one for each picture of the latent batch"
        )


def check_batch(masks: Sequence[Tensor | None], pictures: int) -> None:
    """RoutingError unless each mask is one for all, or one for each of ``pictures`` in the latent
    batch."""
    for number, mask in enumerate(masks, 1):
        if mask is not None and count_of(mask) not in (1, pictures):
            raise RoutingError(
                f"masks: subject {number} has {count_of(mask)} masks, the batch has "
                f"{pictures} pictures; give it one mask for all, or one for each picture"
            )


def lost_subjects(masks: Mapping[str, Tensor], *, exclusive: bool) -> dict[str, str]:
    """Which of the named masks leave their subject without any place, in every picture, and why.

    A place is a subject's from 0.5 on. ``exclusive``: it is the stronger one's alone, and the first
    one's at a tie (:class:`.sources.MaskRoutes`); else masks may share it."""
    lost: dict[str, str] = {}
    for name, mask in masks.items():
        most = float(mask.max())
        if most == 0:
            lost[name] = (
                f"{name} is empty (as Load Image's is for a picture without alpha); paint it white "
                "where the subject goes"
            )
        elif most < 0.5:
            lost[name] = (
                f"{name} is nowhere above 0.5 (its highest value is {most:.2f}); make it white "
                "where the subject goes"
            )
    if exclusive and len(masks) > 1:
        winners = _winners(list(masks.values()))
        for number, (name, mask) in enumerate(masks.items()):
            if name not in lost and not bool((winners == number).any()):
                inside = _on(mask, winners.shape[-2:]).expand(winners.shape) >= 0.5
                taken = int(winners[inside].mode().values) if bool(inside.any()) else number
                over = list(masks)[taken]
                if over != name:
                    lost[name] = (
                        f"{name} lies wholly under {over}, which is as strong or stronger; move "
                        "one of the two, or choose the mode 'learned within masks'"
                    )
    return lost


def _winners(masks: Sequence[Tensor]) -> Tensor:
    """(M,H,W): number of the candidate that each place goes to, the background's last."""
    size = max((mask.shape[-2:] for mask in masks), key=lambda s: s[0] * s[1])
    pictures = max(count_of(mask) for mask in masks)
    weights = torch.stack([_on(mask, size).expand(pictures, -1, -1) for mask in masks])
    return torch.cat((weights, 1 - weights.amax(dim=0, keepdim=True))).argmax(dim=0)


def _on(mask: Tensor, size: Sequence[int]) -> Tensor:
    """(M,H,W) on another size, each place the value of the nearest."""
    stacked = mask if mask.ndim == 3 else mask[None]
    return torch.nn.functional.interpolate(stacked[:, None], size=tuple(size), mode="nearest")[:, 0]
