"""The two stages as modules: what is trained, and a forward pass from a batch to losses.

Both run the frozen U-Net through :mod:`.hosts.unet`. The base is kept out of the module; of
what is in it, optimisers and checkpoints see the trained parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from .dataset import sample_seed
from .hosts import unet as diffusers_unet
from .hosts.frozen import FrozenNetworks
from .hosts.unet import UNetInputs
from .losses import diffusion_loss, mean_routing_loss, routing_loss


@dataclass(frozen=True)
class Noised:
    """A batch on its way into the U-Net: all that Eq. 1 needs. noise (B,4,h,w) is what was added;
    ``seeds`` (B) are for Gumbel noise."""

    inputs: UNetInputs
    noise: Tensor
    seeds: tuple[int, ...]


def add_noise(
    clean: Tensor, numbers: Sequence[int], seed: int, alphas: Tensor, *, cubic: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """z_t = alpha_t z_0 + sigma_t eps, with t and eps from each sample's own number:
    (z_t, eps, t). ``cubic``: t = (1 - u^3) T with u uniform, as T2I-Adapter draws it."""
    timesteps: list[Tensor] = []
    noise: list[Tensor] = []
    for number in numbers:
        generator = torch.Generator().manual_seed(sample_seed(seed, number))
        if cubic:
            late = 1 - torch.rand((), generator=generator) ** 3
            timesteps.append((late * len(alphas)).long().clamp_max(len(alphas) - 1))
        else:
            timesteps.append(torch.randint(len(alphas), (), generator=generator))
        noise.append(torch.randn(clean.shape[1:], generator=generator))
    t = torch.stack(timesteps).to(clean.device)
    eps = torch.stack(noise).to(clean)
    alpha = alphas[torch.stack(timesteps)].to(clean)[:, None, None, None]
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * eps, eps, t


def gumbel_seeds(seed: int, numbers: Sequence[int]) -> tuple[int, ...]:
    """A seed for each row's Gumbel noise, small enough to be multiplied by a number of blocks."""
    return tuple(sample_seed(seed, number) % 2**48 for number in numbers)


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
        """The U-Net's noise prediction (B,4,h,w)."""
        return diffusers_unet.predict(self.frozen.unet, self._slot, call, inputs)

    def forward(self, batch: Batch, noised: Noised) -> dict[str, Tensor]:
        """Losses by name; "loss" is what is minimised."""
        call = self.conditions(batch, noised.seeds)
        predicted = self.predict(call, noised.inputs)
        diffusion = diffusion_loss(predicted, noised.noise, batch.masks, self.inside)
        height, width = noised.inputs.latents.shape[-2:]
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
        self.requires_grad_(True)
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
                module.requires_grad_(True).float()

    def conditions(self, batch: Batch, seeds: tuple[int, ...]) -> TrainingCall:
        model = self.model
        if model.encoder.routing is None or model.routers is None:
            raise ValueError("stage 'router' needs a model with the router parts")
        rows, subjects = batch.present.shape
        states = self.clip_states(batch.clip.flatten(0, 1))
        zero = self.background_states(batch.clip.device)
        routing = model.encoder.routing(states)[:, 0].reshape(rows, subjects, -1)
        routing_zero = model.encoder.routing(zero)[:, 0].expand(rows, 1, -1)
        with torch.no_grad():
            tokens: list[Tensor | None] = [None] * (subjects + 1)
            if model.encoder.subject is not None:
                frozen = next(model.encoder.subject.parameters()).dtype
                encoded = model.encoder.subject(states.to(frozen))
                encoded = encoded.reshape(rows, subjects, *encoded.shape[1:])
                tokens = [*encoded.unbind(1), model.encoder.subject(zero.to(frozen))]
            stacked = self.references(batch.vae.flatten(0, 1), batch.reference_mask.flatten(0, 1))
            features = [
                tuple(g.reshape(rows, subjects, *g.shape[1:])[:, i] for g in stacked)
                for i in range(subjects)
            ]
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


def build_stage(model: AnyStoryModel, encodings: Encodings, config: TrainingConfig) -> Stage:
    """The stage that the configuration asks for."""
    return (SubjectStage if config.stage == "subject" else RouterStage)(model, encodings, config)
