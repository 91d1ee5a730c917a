"""Subject tokens that know the subject's name and place: MS-Diffusion's queries (arXiv 2406.07209).

A QFormer's queries are learned. Here they are made of a phrase p, the pooled state of CLIP's small
text encoder before any projection, and of a box b, x0, y0, x1, y1 as fractions of the picture's
sides:

    L_0 = LayerNorm(W_2 GELU(W_1 [p; F(b)])),  F(b) = sin, cos of 100^(k/K) b,  k = 0 ... K-1

F is ordered by frequency, then sine and cosine, then the numbers of the box. The learned queries
are for subjects without a place: a tenth of the training samples had none. After the last layer the
latents pass one norm more than a QFormer's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GroundingConfig, QFormerConfig
from ..errors import RoutingError
from .encoder import Encoders
from .preprocess import mask_box
from .qformer import QFormer
from .subject import Subject

_TEMPERATURE = 100.0


@dataclass(frozen=True)
class Box:
    """A part of the picture, each number in [0,1] by its own side. RoutingError: outside."""

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        if not (0 <= self.x0 <= self.x1 <= 1 and 0 <= self.y0 <= self.y1 <= 1):
            raise RoutingError(
                f"box: got {dataclasses.astuple(self)}, expected 0 <= x0 <= x1 <= 1 and "
                "0 <= y0 <= y1 <= 1; it reaches out of the picture"
            )

    @classmethod
    def around(cls, mask: Tensor) -> Box:
        """Of a mask (H,W) where it is at least 0.5; a box of no size when it is nowhere."""
        inside = mask >= 0.5
        if not bool(inside.any()):
            return cls(0, 0, 0, 0)
        top, bottom, left, right = mask_box(inside)
        height, width = mask.shape
        return cls(left / width, top / height, right / width, bottom / height)


class GroundedQFormer(QFormer):
    """A QFormer whose queries may be made of a phrase and a box; V pictures, T queries."""

    def __init__(
        self,
        config: QFormerConfig,
        grounding: GroundingConfig,
        *,
        input_dim: int,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        super().__init__(config, input_dim=input_dim, operations=operations, **kw)
        self.frequencies = grounding.frequencies
        inputs = grounding.phrase_dim + grounding.box_dim
        self.latent_proj = nn.Sequential(
            operations.Linear(inputs, 2 * inputs, **kw),
            nn.GELU(),
            operations.Linear(2 * inputs, config.queries * config.width, **kw),
        )
        self.latent_norm = operations.LayerNorm(config.width, **kw)
        self.attention_norm = operations.LayerNorm(config.width, **kw)

    def finished(self, latents: Tensor) -> Tensor:
        return self.attention_norm(latents)

    def queries(self, phrase: Tensor, box: Box) -> Tensor:
        """(phrase_dim,) and a box -> (1,T,width)."""
        grounded = torch.cat((phrase, fourier(box, self.frequencies).to(phrase)))
        latents = self.latent_proj(grounded[None])
        return self.latent_norm(latents.unflatten(-1, self.latents.shape[1:]))

    def grounded(self, states: Tensor, phrase: Tensor, box: Box) -> Tensor:
        """CLIP states (V,S,input_dim) of V pictures of one subject -> tokens (V,T,output_dim)."""
        return self.resample(states, self.queries(phrase, box))


def fourier(box: Box, frequencies: int) -> Tensor:
    """F of a box: (8 * frequencies,) in float64."""
    numbers = torch.tensor(dataclasses.astuple(box), dtype=torch.float64)
    steps = torch.arange(frequencies, dtype=torch.float64) / frequencies
    angles = (_TEMPERATURE**steps)[:, None] * numbers
    return torch.stack((angles.sin(), angles.cos()), dim=1).flatten()


def check_phrases(mode: str, subjects: Sequence[Subject]) -> None:
    """RoutingError when subjects are to be grounded, in a mode with masks, and one of those that
    keep their states for it has no phrase."""
    if not mode.endswith("masks"):
        return
    missing = [
        number for number, s in enumerate(subjects, 1) if s.states is not None and s.phrase is None
    ]
    if missing:
        raise RoutingError(
            f"mode {mode!r}: these AnyStory weights read each subject's label beside its mask, and "
            f"subject {missing} has none; give its Encode Subject node a label, the words that "
            "name it in the prompt, and connect the prompt's clip to it"
        )


@torch.no_grad()
def ground_subjects(
    model: Encoders, mode: str, subjects: Sequence[Subject], masks: Sequence[Tensor | None]
) -> list[Subject]:
    """Subjects with the tokens of their places, for the modes with masks and weights that are
    grounded; elsewhere as they are, with the learned queries' tokens. Their tensors are where the
    encoder is. RoutingError as in :func:`check_phrases`."""
    check_phrases(mode, subjects)
    encoder = model.encoder.subject
    if not isinstance(encoder, GroundedQFormer) or not mode.endswith("masks"):
        return list(subjects)
    placed: list[Subject] = []
    for subject, mask in zip(subjects, masks, strict=True):
        if mask is None or subject.states is None or subject.phrase is None:
            placed.append(subject)
            continue
        tokens = encoder.grounded(subject.states, subject.phrase, Box.around(mask.cpu()))
        placed.append(dataclasses.replace(subject, tokens=tokens.flatten(0, 1)))
    return placed
