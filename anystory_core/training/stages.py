"""The two stages as modules: what is trained, and a forward pass from a batch to losses.

Both run the frozen U-Net through :mod:`.hosts.unet`. The base is kept out of the module; of
what is in it, optimisers and checkpoints see the trained parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..injection.call import Call
from ..injection.prepare import PreparedSubjects, project
from ..injection.rows import Rows
from ..routing.grids import Grid, SoftMaps
from ..routing.sources import LearnedRoutes, SingleRoute
from ..subject.preprocess import latent_mask, zero_clip
from ..weights.model import AnyStoryModel
from .batches import Batch
from .cache import Encodings
from .call import TrainingCall
from .config import TrainingConfig
from .hosts import unet as diffusers_unet
from .hosts.frozen import FrozenNetworks
from .hosts.unet import UNetInputs
from .losses import Weighting, diffusion_loss, mean_routing_loss, routing_loss
from .measures import row_figures
from .noise import Noised


class Stage(nn.Module):
    """Common to both stages. ``parts`` are the AnyStory modules, frozen ones included."""

    def __init__(self, model: AnyStoryModel, encodings: Encodings, config: TrainingConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.inside = 0.0 if config.subject is None else config.subject.inside
        # Out of reach of nn.Module: never trained, saved or sharded.
        self._frozen: list[Any] = [encodings]
        frozen = encodings.frozen
        self._slot = diffusers_unet.install(frozen.unet, model.sites)
        for name, module in model.modules():
            self.add_module(name, module)
        if config.run.checkpointing:
            frozen.unet.train()  # diffusers recomputes only in training mode; it has no dropout
            frozen.unet.enable_gradient_checkpointing()

    @property
    def encodings(self) -> Encodings:
        return self._frozen[0]

    @property
    def frozen(self) -> FrozenNetworks:
        return self.encodings.frozen

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in a weights file, parameter) of all that this stage trains."""
        return (item for item in self.named_parameters() if item[1].requires_grad)

    def conditions(self, batch: Batch, seeds: tuple[int, ...]) -> TrainingCall:
        """The call that serves this batch; differentiable."""
        raise NotImplementedError

    def predict(self, call: Call | None, inputs: UNetInputs) -> Tensor:
        """What the U-Net predicts (B,4,h,w): noise, or v."""
        return diffusers_unet.predict(self.frozen.unet, self._slot, call, inputs)

    def forward(self, batch: Batch, noised: Noised, *, measure: bool = False) -> dict[str, Tensor]:
        """Losses by name, "loss" being what is minimised; or, to ``measure``, figures of each row
        (B), NaN where a row has none (:func:`~.measures.row_figures`)."""
        call = self.conditions(batch, noised.seeds)
        predicted = self.predict(call, noised.inputs)
        height, width = noised.inputs.latents.shape[-2:]
        if measure:
            maps = list(call.soft_maps.values()) if self.config.router is not None else []
            return row_figures(predicted, noised.target, batch, maps)
        settings = self.config.loss
        diffusion = diffusion_loss(
            predicted,
            noised.target,
            Weighting(settings, noised.snr, self.frozen.prediction.kind),
            batch.masks,
            self.inside,
        )
        return self.total({"diffusion": diffusion}, call, batch, (height, width))

    def total(
        self, losses: dict[str, Tensor], call: TrainingCall, batch: Batch, grid: Grid
    ) -> dict[str, Tensor]:
        """Add "loss" and what else the stage minimises; ``grid``: the latents'."""
        return {**losses, "loss": losses["diffusion"]}

    def clip_states(self, pixels: Tensor) -> Tensor:
        """(B,3,S,S) -> (B,S,W) in the dtype of the trained modules."""
        return self.encodings.clip_states(pixels).to(self.dtype)

    @property
    def weights(self) -> torch.dtype:
        """What is trained is held in it."""
        return torch.bfloat16 if self.config.optimiser.weights == "bf16" else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        return next(self.trained())[1].dtype

    def background_states(self, device: torch.device) -> Tensor:
        """CLIP states (1,S,W) of the zero image."""
        return self.clip_states(zero_clip(self.model.config).to(device))

    def make_call(
        self, prepared: PreparedSubjects, batch: int, gumbel: tuple[int, ...] = ()
    ) -> TrainingCall:
        return TrainingCall(
            prepared,
            Rows(tuple(range(batch))),
            (True,) * prepared.subjects,
            self.model.sites,
            diffusers_unet.dense_attention,
            gumbel=gumbel,
        )

    def references(self, vae: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """ReferenceNet features G^2..G^L of (B,3,R,R), (B,1,R,R): each (B,G,d)."""
        net = self.model.reference_net
        if net is None:
            return ()
        latents = self.encodings.reference_latents(vae).to(next(net.parameters()).dtype)
        channel = latent_mask(mask, (latents.shape[-2], latents.shape[-1])).to(latents)
        return net(torch.cat((latents, channel), dim=1))


class SubjectStage(Stage):
    """Stage 1: subject QFormer, ReferenceNet and all K, V maps. One subject, routed everywhere."""

    def __init__(self, model: AnyStoryModel, encodings: Encodings, config: TrainingConfig) -> None:
        super().__init__(model, encodings, config)
        self.requires_grad_(True).to(self.weights)
        if model.reference_net is not None:
            model.reference_net.recompute = config.run.checkpointing

    def conditions(self, batch: Batch, seeds: tuple[int, ...]) -> TrainingCall:
        tokens = background = None
        if self.model.encoder.subject is not None:
            tokens, _ = self.model.encoder(self.clip_states(batch.clip[:, 0]))
            background, _ = self.model.encoder(self.background_states(batch.clip.device))
            tokens = torch.where(batch.drop_clip[:, None, None], background, tokens)
        features = self.references(batch.vae[:, 0], batch.reference_mask[:, 0])
        conditions = project(
            self.model.projections, self.model.sites, [tokens, background], [features or None, None]
        )
        gamma = 0.0 if features else -math.inf
        prepared = PreparedSubjects(conditions, SingleRoute(), (1.0, 1.0), (gamma, -math.inf))
        return self.make_call(prepared, len(batch.numbers))


class RouterStage(Stage):
    """Stage 2: the routing QFormer and the routers, on a frozen subject encoder."""

    def __init__(self, model: AnyStoryModel, encodings: Encodings, config: TrainingConfig) -> None:
        super().__init__(model, encodings, config)
        # What is frozen takes the base's precision: its float32 copy would be as large as the base.
        self.requires_grad_(False).to(self.frozen.unet.dtype)
        for module in (model.encoder.routing, model.routers):
            if module is not None:
                module.requires_grad_(True).to(self.weights)

    def conditions(self, batch: Batch, seeds: tuple[int, ...]) -> TrainingCall:
        model = self.model
        if model.encoder.routing is None or model.routers is None:
            raise ValueError("stage 'router' needs a model with the router parts")
        rows, subjects = batch.present.shape
        there = batch.present.clone()
        there[0, 0] = True  # encode one, so that shapes are known where no row has a subject
        states = self.clip_states(batch.clip[there])
        zero = self.background_states(batch.clip.device)
        routing = _spread(model.encoder.routing(states)[:, 0], there)
        routing_zero = model.encoder.routing(zero)[:, 0].expand(rows, 1, -1)
        with torch.no_grad():
            tokens: list[Tensor | None] = [None] * (subjects + 1)
            if model.encoder.subject is not None:
                frozen = next(model.encoder.subject.parameters()).dtype
                encoded = _spread(model.encoder.subject(states.to(frozen)), there)
                tokens = [*encoded.unbind(1), model.encoder.subject(zero.to(frozen))]
            stacked = self.references(batch.vae[there], batch.reference_mask[there])
            spread = [_spread(g, there) for g in stacked]
            features = [tuple(g[:, i] for g in spread) for i in range(subjects)]
            conditions = project(model.projections, model.sites, tokens, [*features, None])
        present = torch.cat((batch.present, torch.ones_like(batch.present[:, :1])), dim=1)
        source = LearnedRoutes.prepare(
            model.routers, torch.cat((routing, routing_zero), dim=1), present=present
        )
        gamma = 0.0 if stacked else -math.inf
        biases = (gamma,) * subjects + (-math.inf,)
        prepared = PreparedSubjects(conditions, source, (1.0,) * (subjects + 1), biases)
        return self.make_call(prepared, rows, seeds)

    def total(
        self, losses: dict[str, Tensor], call: TrainingCall, batch: Batch, grid: Grid
    ) -> dict[str, Tensor]:
        settings = self.config.router
        assert settings is not None
        maps: list[SoftMaps] = list(call.soft_maps.values())
        errors = routing_loss(maps, batch.masks, batch.present, settings.tokens)
        loss = losses["diffusion"] + settings.route_weight * self._supervised(errors)
        losses = {**losses, "route": errors[0], "coarse": errors[1]}
        if settings.mean_weight:
            errors = mean_routing_loss(maps, batch.masks, batch.present, grid)
            loss = loss + settings.mean_weight * self._supervised(errors)
            losses["mean_route"] = errors[0]
        return {**losses, "loss": loss}

    def _supervised(self, errors: tuple[Tensor, Tensor]) -> Tensor:
        """Of refined and coarse maps; without refinement they are the same."""
        refined, coarse = errors
        return refined + coarse if self.model.config.router.refine else refined


def _spread(values: Tensor, there: Tensor) -> Tensor:
    """(M,...) of the M that are ``there`` (B,N) -> (B,N,...), zeros for the others."""
    spread = values.new_zeros(*there.shape, *values.shape[1:])
    spread[there] = values
    return spread


def build_stage(model: AnyStoryModel, encodings: Encodings, config: TrainingConfig) -> Stage:
    """The stage that the configuration asks for."""
    return (SubjectStage if config.stage == "subject" else RouterStage)(model, encodings, config)
