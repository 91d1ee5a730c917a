"""References at the noise of the step, in the host: one more pass of the U-Net for each noise level
(:mod:`....anystory_core.injection.matched`).

The pass goes to the U-Net itself, past all wrappers around it, and with our patches alone: other
packs neither count it nor change it, it is not recorded, and it makes no passes of its own. Weights
are those of the moment, so LoRAs act in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....anystory_core.errors import ModelMismatchError
from ....anystory_core.injection.keys import Candidates
from ....anystory_core.injection.matched import (
    MatchedReferences,
    ReferenceInputs,
    ReferencePass,
)
from ....anystory_core.injection.prepare import PreparedSubjects
from ..conds import is_hooked
from ..ids import CALL_KEY, OVERRIDE
from ..windows import Window
from .patcher import BlockTable, installed


@dataclass(frozen=True)
class Level:
    """What a pass of ``unet`` shows: latents x (B,C,h,w), timesteps (B) and label embeddings y
    (B,A). ``forward``: the U-Net's own, without any wrapper."""

    forward: Callable[..., Any]
    unet: Any
    x: Tensor
    timesteps: Tensor
    y: Tensor | None


@dataclass
class MatchedPass:
    """Reads the references of one run; those of the latest noise level are kept, for all calls at
    it, once for each device that a U-Net is on.

    ``sampling``: how the host's model noises its latents. ``constant``: weights are the same in all
    calls (no LoRA hooks)."""

    references: MatchedReferences
    table: BlockTable
    window: Window
    sampling: Any
    constant: bool
    _latest: dict[int, tuple[float, dict[int, Candidates]]] = field(
        default_factory=dict[int, tuple[float, dict[int, Candidates]]], repr=False
    )

    @classmethod
    def of(cls, guider: Any, references: MatchedReferences, table: BlockTable) -> MatchedPass:
        """For a run of ``guider``. ModelMismatchError: its model reads more than a latent."""
        model = guider.model_patcher
        sampling = model.get_model_object("model_sampling")
        expected = references.pictures[0].latent.shape[0]
        channels = getattr(model.model.diffusion_model, "in_channels", expected)
        if channels != expected:
            raise ModelMismatchError(
                f"references 'matched noise': the model reads {channels} channels (an inpainting "
                f"or edit model), expected {expected}; load a plain checkpoint, or choose other "
                "references"
            )
        to_sigma = sampling.percent_to_sigma
        window = Window(float(to_sigma(references.start)), float(to_sigma(references.end)))
        return cls(references, table, window, sampling, constant=not is_hooked(guider))

    def prepared_at(
        self,
        prepared: PreparedSubjects,
        level: Level,
        sigma: float,
        row: int,
        options: dict[str, Any],
    ) -> PreparedSubjects:
        """``prepared`` with the references of a pass at noise level ``sigma``. Sizes and timestep
        are those of its row ``row``."""
        place = id(level.unet)
        known = self._latest.get(place)
        if known is None or known[0] != sigma or not self.constant:
            self._latest.pop(place, None)  # before others are made beside them
            known = sigma, self._read(sigma, level, row, options)
            self._latest[place] = known
        return prepared.with_references(known[1])

    def _read(
        self, sigma: float, level: Level, row: int, options: dict[str, Any]
    ) -> dict[int, Candidates]:
        x = level.x

        def forward(given: ReferenceInputs, reading: ReferencePass) -> None:
            count = given.latents.shape[0]
            sigmas = torch.full((count,), sigma, device=x.device)
            latents, noise = given.latents.to(x.device), given.noise.to(x.device)
            noisy = self.sampling.noise_scaling(sigmas, noise, latents)
            inputs = self.sampling.calculate_input(sigmas, noisy).to(x.dtype)
            y = None
            if level.y is not None:
                own = level.y[row : row + 1].expand(count, -1)
                y = torch.cat((given.pooled.to(own), own[:, given.pooled.shape[1] :]), dim=1)
            level.forward(
                inputs,
                level.timesteps[row : row + 1].expand(count),
                given.text.to(x),
                y,
                None,
                self._options(reading, count, options, level.unet),
            )

        # As many at once as the run's own rows are large.
        side = self.references.pictures[0].latent.shape[-1]
        at_once = max(1, x.shape[0] * x.shape[-2] * x.shape[-1] // side**2)
        return self.references.read(sigma, forward, at_once=at_once)

    def _options(
        self, reading: ReferencePass, count: int, options: dict[str, Any], unet: Any
    ) -> dict[str, Any]:
        kept = {name: options[name] for name in ("sigmas", OVERRIDE) if name in options}
        own = {**kept, "cond_or_uncond": [0] * count}
        return {**installed(own, self.table, unet, late=False), CALL_KEY: reading}
