"""The passes of FLUX in one sampling run: the wrappers that give each forward pass its
:class:`~....anystory_core.bases.flux.call.FluxCall`, and the references of every prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ....anystory_core.bases.flux.attention import Layout
from ....anystory_core.bases.flux.call import FluxCall, RowGroup
from ....anystory_core.bases.flux.low_rank import StreamBranches
from ....anystory_core.bases.flux.reference import References, reference_pass
from ....anystory_core.errors import ModelMismatchError
from ....anystory_core.injection.flux import FluxRun
from ....anystory_core.routing.grids import Crop
from ..base import Entry
from ..ids import OVERRIDE
from ..passes import CondRows, RunPasses
from .patches import BlockTable, HeadAttention, installed

# Of Flux.forward: x, timestep, context, y, guidance, ref_latents, control, transformer_options.
_NAMES = ("x", "timestep", "context", "y", "guidance", "ref_latents", "control")
_OPTIONS = len(_NAMES)


@dataclass(frozen=True)
class Prompt:
    """What the references depend on, and their keys and values."""

    pooled: Tensor | None  # (1,P)
    guidance: Tensor | None  # (1,)
    references: References

    def serves(self, pooled: Tensor | None, guidance: Tensor | None) -> bool:
        """Whether another prompt has the same pooled text and guidance, on the same device."""
        pairs = ((self.pooled, pooled), (self.guidance, guidance))
        return all(
            (a is None and b is None)
            or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))
            for a, b in pairs
        )


@dataclass(kw_only=True)
class FluxPasses(RunPasses):
    """The passes of FLUX in one sampling run: the inner wrappers, and what they share."""

    run: FluxRun
    branches: StreamBranches | None
    table: BlockTable
    prompts: list[Prompt] = field(default_factory=list[Prompt])
    known: dict[Any, Prompt] = field(default_factory=dict[Any, Prompt])  # by uuid and device

    # The wrappers, outermost first.

    def prepare_sampling(
        self, executor: Callable[..., Any], model: Any, noise_shape: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The host plans its memory by the size of the latent: our tokens, keys and values count as
        further rows of it."""
        return executor(model, self._with_ours(model.model, list(noise_shape)), *args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def diffusion_model(
        self, executor: WrapperExecutor, entry: Entry, *args: Any, **kwargs: Any
    ) -> Any:
        """Gives this forward pass the subjects' tokens, and the patches that ask a fresh
        :class:`FluxCall`."""
        values = dict(zip(_NAMES, args, strict=False))
        named = "transformer_options" in kwargs
        options = kwargs.pop("transformer_options") if named else args[_OPTIONS]
        rest = args[_OPTIONS + 1 :]
        values |= {name: kwargs.pop(name) for name in _NAMES if name in kwargs}
        options = self._begin(options, values, kwargs, entry, executor.class_obj)
        return executor(*(values.get(name) for name in _NAMES), options, *rest, **kwargs)

    @torch.compiler.disable
    def _begin(
        self,
        options: dict[str, Any],
        values: dict[str, Any],
        kwargs: dict[str, Any],
        entry: Entry,
        net: Any,
    ) -> dict[str, Any]:
        """The options of a pass of ``net``, themselves where nothing acts; writes the longer
        context and mask into ``values`` and ``kwargs``."""
        x, context = values["x"], values["context"]
        sigma = self.sigma(options)
        concepts, biases = self.run.concepts_at(sigma), self.run.biases_at(sigma)
        active = [
            tokens is not None or bias > -math.inf
            for tokens, bias in zip(concepts.tokens, biases, strict=True)
        ]
        if not any(active):
            self.record.call(sigma, active)
            return options
        if values.get("ref_latents") is not None:
            raise ModelMismatchError(
                "positive: it has reference latents (FLUX Kontext), whose tokens AnyStory does not "
                "know; connect a conditioning without them"
            )
        channels: int = self.run.latents[0].shape[1]
        if x.shape[1] != channels:
            raise ModelMismatchError(
                f"model: it takes {x.shape[1]} channels, these AnyStory weights expect {channels}: "
                "a control LoRA, or another node, gives it more than the latent; load FLUX.1-dev "
                "without it"
            )
        conds = self.conds_of(options, x, self.run.pictures)
        recording = self.recording(options, x, conds, entry, active)
        groups, views = self._groups(conds, values, options, biases, net)
        if not any(group.acts for group in groups):
            return options
        patch = net.patch_size
        grid = -(-x.shape[-2] // patch), -(-x.shape[-1] // patch)
        layout = Layout(context.shape[1], concepts.lengths, grid, concepts.repeats)
        recorder, recorded = (None, ()) if recording is None else recording
        call = FluxCall(
            self.record.sites,
            layout,
            tuple(groups),
            biases,
            HeadAttention({**options}, options.get(OVERRIDE)),
            HeadAttention({**options}),
            regions=self.run.regions(grid, views, x.device),
            router=self.run.router,
            allowed=self.run.allowed(grid, views, x.device),
            recorder=recorder,
            record=recorded,
        )
        call.enter(net, context)
        values["context"] = concepts.behind(context)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = with_concepts(kwargs["attention_mask"], layout)
        return installed(options, self.table, net, call)

    def _groups(
        self,
        conds: Sequence[CondRows],
        values: dict[str, Any],
        options: dict[str, Any],
        biases: Sequence[float],
        net: Any,
    ) -> tuple[list[RowGroup], tuple[Crop | None, ...]]:
        """Which rows take part with which references, and what those that do show."""
        acting: list[RowGroup] = []
        idle: list[int] = []
        views: list[Crop | None] = []
        for cond in conds:
            if not cond.conditional and not self.run.keep_in_uncond:
                idle.extend(cond.rows)
                continue
            shown = dict(zip(cond.rows, cond.views, strict=True))
            for group in self._of_cond(cond, values, options, biases, net):
                acting.append(group)
                views.extend(shown[row] for row in group.rows)
        return [*acting, *([RowGroup(tuple(idle), False)] if idle else [])], tuple(views)

    def _of_cond(
        self,
        cond: CondRows,
        values: dict[str, Any],
        options: dict[str, Any],
        biases: Sequence[float],
        net: Any,
    ) -> list[RowGroup]:
        """The rows of one cond; rows of different pooled texts are groups of their own."""
        if all(bias == -math.inf for bias in biases) or self.branches is None:
            return [RowGroup(cond.rows, True)]
        x, pooled, guidance = values["x"], values.get("y"), values.get("guidance")
        key = None if cond.uuid is None else (cond.uuid, x.device)
        if key in self.known:
            return [RowGroup(cond.rows, True, self.known[key].references)]
        groups: list[tuple[Prompt, list[int]]] = []
        for row in cond.rows:
            found = self._prompt(_row(pooled, row), _row(guidance, row), x, options, net)
            for prompt, own in groups:
                if prompt is found:
                    own.append(row)
                    break
            else:
                groups.append((found, [row]))
        if len(groups) == 1 and key is not None:
            self.known[key] = groups[0][0]
        return [RowGroup(tuple(own), True, prompt.references) for prompt, own in groups]

    def _prompt(
        self,
        pooled: Tensor | None,
        guidance: Tensor | None,
        x: Tensor,
        options: dict[str, Any],
        net: Any,
    ) -> Prompt:
        """The references of a prompt, made when it is first seen."""
        for prompt in self.prompts:
            if prompt.serves(pooled, guidance):
                return prompt
        assert self.branches is not None  # groups without references are made before
        given = [bias > -math.inf for bias in self.run.biases]
        references = reference_pass(
            net,
            self.branches,
            [x if on else x[:0] for x, on in zip(self.run.latents, given, strict=True)],
            [x if on else x[:0] for x, on in zip(self.run.keep, given, strict=True)],
            guidance=guidance,
            pooled=pooled,
            like=x,
            attention=HeadAttention({**options}),
        )
        kept = (None if part is None else part.clone() for part in (pooled, guidance))
        prompt = Prompt(*kept, references)
        self.prompts.append(prompt)
        return prompt

    def _with_ours(self, model: Any, shape: list[int]) -> list[int]:
        """The latent's shape with rows for the tokens of subjects and router, and for the keys and
        values of the references."""
        net, run = model.diffusion_model, self.run
        width = max(1, -(-shape[-1] // net.patch_size))
        tokens = sum(x.shape[0] for x in run.concepts.tokens if x is not None)
        tokens += 0 if run.router is None else run.router.tokens.shape[1]
        kept = sum(
            int(mask.sum())
            for mask, bias in zip(run.keep, run.biases, strict=True)
            if bias > -math.inf
        )
        blocks = len(self.table.sites)
        dtype = model.manual_cast_dtype or model.get_dtype()
        size = 2 * blocks * kept * net.hidden_size * dtype.itemsize
        row = [*shape[:-2], net.patch_size, shape[-1]]
        rows = math.ceil((tokens + kept) / width)
        rows += math.ceil(size / max(1, model.memory_required(row)))
        return [*shape[:-2], shape[-2] + rows * net.patch_size, shape[-1]]


def _row(x: Tensor | None, row: int) -> Tensor | None:
    """(1,...) of a batch; what is given once serves all rows."""
    if x is None:
        return None
    return x[row : row + 1] if x.shape[0] > 1 else x


def with_concepts(mask: Tensor, layout: Layout) -> Tensor:
    """A mask (...,T+M,T+M) over text and image, bool or additive, with rows and columns for the
    subjects' tokens, to which it says nothing: (...,L,L)."""
    count = layout.start - layout.text
    if count == 0:
        return mask
    fill = 1 if mask.dtype == torch.bool else 0
    for dim in (-1, -2):
        size = mask.shape[dim]
        before = mask.narrow(dim, 0, layout.text)
        after = mask.narrow(dim, layout.text, size - layout.text)
        shape = list(mask.shape)
        shape[dim] = count
        mask = torch.cat((before, mask.new_full(shape, fill), after), dim=dim)
    return mask
