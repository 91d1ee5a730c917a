"""The passes of FLUX in one sampling run: the wrappers that give each forward pass its
:class:`~....anystory_core.bases.flux.call.FluxCall`, and the references of every prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.patcher_extension
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....anystory_core.bases.flux.attention import Layout
from ....anystory_core.bases.flux.call import FluxCall, RowGroup
from ....anystory_core.bases.flux.low_rank import StreamBranches
from ....anystory_core.bases.flux.reference import References, reference_pass
from ....anystory_core.errors import ModelMismatchError
from ....anystory_core.injection.flux import FluxRun
from ....anystory_core.routing.grids import Crop
from ....anystory_core.routing.record import RoutingRecord
from ..conds import Evaluation, Roles
from ..ids import CALL_KEY, EVALUATION_KEY, WRAPPER_KEY
from .patches import HeadAttention, install

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
        """Whether another prompt has the same pooled text and guidance."""
        pairs = ((self.pooled, pooled), (self.guidance, guidance))
        return all(
            (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
            for a, b in pairs
        )


@dataclass
class FluxPasses:
    """The passes of FLUX in one sampling run: the inner wrappers, and what they share."""

    run: FluxRun
    branches: StreamBranches | None
    record: RoutingRecord
    roles: Roles
    net: Any
    fresh: bool = True  # the next call is the first of a model evaluation
    previous: Any = None  # override of the attention by another pack
    prompts: list[Prompt] = field(default_factory=list)
    known: dict[Any, Prompt] = field(default_factory=dict)  # by the uuid of a cond

    def installed(self, before: dict[str, Any]) -> dict[str, Any]:
        """A copy of the guider's transformer options with this run's patches and wrappers."""
        options = comfy.patcher_extension.copy_nested_dicts(before)
        routed = self.run.router is not None
        self.previous = install(options, self.record.sites, self.net, routed=routed)
        for kind, wrapper in (
            (WrappersMP.PREPARE_SAMPLING, self.prepare_sampling),
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.CALC_COND_BATCH, self.calc_cond_batch),
            (WrappersMP.DIFFUSION_MODEL, self.diffusion_model),
        ):
            comfy.patcher_extension.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper, options)
        return options

    # The inner wrappers, outermost first.

    def prepare_sampling(
        self, executor: Callable[..., Any], model: Any, noise_shape: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The host plans its memory by the size of the latent: our tokens, keys and values count as
        further rows of it."""
        return executor(model, self._with_ours(model, list(noise_shape)), *args, **kwargs)

    def predict_noise(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the guided model; its first call is the one that may be recorded."""
        self.fresh = True
        return executor(*args, **kwargs)

    def calc_cond_batch(
        self, executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor,
        timestep: Tensor, model_options: dict[str, Any],
    ) -> Any:  # fmt: skip
        """Tells the calls inside which ``conds`` index is conditional."""
        options = dict(model_options.get("transformer_options", {}))
        options[EVALUATION_KEY] = Evaluation.of(self.roles, conds, x, timestep)
        return executor(
            model, conds, x, timestep, {**model_options, "transformer_options": options}
        )

    def diffusion_model(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gives this forward pass the subjects' tokens and a fresh :class:`FluxCall`."""
        values = dict(zip(_NAMES, args, strict=False))
        named = "transformer_options" in kwargs
        options = kwargs.pop("transformer_options") if named else args[_OPTIONS]
        rest = args[_OPTIONS + 1 :]
        values |= {name: kwargs.pop(name) for name in _NAMES if name in kwargs}
        given = [values.get(name) for name in _NAMES]
        options = self._begin(options, values, kwargs, given)
        return executor(*given, options, *rest, **kwargs)

    @torch.compiler.disable
    def _begin(
        self, options: dict[str, Any], values: dict[str, Any], kwargs: dict[str, Any],
        given: list[Any],
    ) -> dict[str, Any]:  # fmt: skip
        """The pass's options; writes the longer context and mask into ``given`` and ``kwargs``."""
        x, context = values["x"], values["context"]
        sigma = float(options["sigmas"][0])
        concepts, biases = self.run.concepts_at(sigma), self.run.biases_at(sigma)
        active = [
            tokens is not None or bias > -math.inf
            for tokens, bias in zip(concepts.tokens, biases, strict=True)
        ]
        if not any(active):
            self.record.begin_step(sigma, active)
            return {**options, CALL_KEY: None}
        if values.get("ref_latents") is not None:
            raise ModelMismatchError(
                "positive: it has reference latents (FLUX Kontext), whose tokens AnyStory does not "
                "know; connect a conditioning without them"
            )
        groups, crops, record = self._rows(options, values, sigma, active, biases)
        if not any(group.acts for group in groups):
            return {**options, CALL_KEY: None}
        patch = self.net.patch_size
        grid = -(-x.shape[-2] // patch), -(-x.shape[-1] // patch)
        layout = Layout(context.shape[1], concepts.lengths, grid)
        acting = sum(len(group.rows) for group in groups if group.acts)
        regions = self.run.regions(grid, crops, acting, x.device)
        call = FluxCall(
            self.record.sites,
            layout,
            tuple(groups),
            biases,
            HeadAttention({**options}, self.previous),
            HeadAttention(options),
            regions=regions,
            router=self.run.router,
            allowed=self.run.allowed(grid, crops, x.device),
            recorder=self.record if record else None,
            record=record,
        )
        call.enter(self.net, context)
        given[_NAMES.index("context")] = concepts.behind(context)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = with_concepts(kwargs["attention_mask"], layout)
        return {**options, CALL_KEY: call}

    def _rows(
        self, options: dict[str, Any], values: dict[str, Any], sigma: float,
        active: Sequence[bool], biases: Sequence[float],
    ) -> tuple[list[RowGroup], tuple[Crop | None, ...], tuple[int, ...]]:  # fmt: skip
        """Which rows take part with which references, the part of the picture of those that do,
        and the rows that are recorded."""
        x = values["x"]
        chunks: list[int] = options["cond_or_uncond"]
        uuids: list[Any] = options.get("uuids", [None] * len(chunks))
        evaluation: Evaluation = options.get(
            EVALUATION_KEY, Evaluation(recorded=(0, self.roles.first_positive))
        )
        size, times = evaluation.layout(len(chunks), x)
        acting: list[RowGroup] = []
        idle: list[int] = []
        crops: list[Crop | None] = []
        record: tuple[int, ...] = ()
        for place, (index, uuid) in enumerate(zip(chunks, uuids, strict=True)):
            firsts = range(place * size, times * size * len(chunks), size * len(chunks))
            rows = tuple(row for first in firsts for row in range(first, first + size))
            if not evaluation.is_cond(index) and not self.run.keep_in_uncond:
                idle.extend(rows)
                continue
            crop = evaluation.crop(uuid, x)
            for group in self._groups(rows, uuid, values, options, biases):
                acting.append(group)
                crops.extend([crop] * len(group.rows))
            if self.fresh and uuid is not None and (index, uuid) == evaluation.recorded:
                if evaluation.is_tile(crop, x):
                    self.record.tiled = True  # its routes are not the picture's
                else:
                    record = rows[:size]
        if record:
            self.fresh = False
            self.record.begin_step(sigma, active)
        groups = [*acting, *([RowGroup(tuple(idle), False)] if idle else [])]
        return groups, tuple(crops) if any(crops) else (), record

    def _groups(
        self, rows: tuple[int, ...], uuid: Any, values: dict[str, Any], options: dict[str, Any],
        biases: Sequence[float],
    ) -> list[RowGroup]:  # fmt: skip
        """The rows of one cond; rows of different pooled texts are groups of their own."""
        if all(bias == -math.inf for bias in biases) or self.branches is None:
            return [RowGroup(rows, True)]
        prompt = self.known.get(uuid) if uuid is not None else None
        if prompt is not None:
            return [RowGroup(rows, True, prompt.references)]
        pooled, guidance = values.get("y"), values.get("guidance")
        groups: list[tuple[Prompt, list[int]]] = []
        for row in rows:
            found = self._prompt(_row(pooled, row), _row(guidance, row), values["x"], options)
            for prompt, own in groups:
                if prompt is found:
                    own.append(row)
                    break
            else:
                groups.append((found, [row]))
        if len(groups) == 1 and uuid is not None:
            self.known[uuid] = groups[0][0]
        return [RowGroup(tuple(own), True, prompt.references) for prompt, own in groups]

    def _prompt(
        self, pooled: Tensor | None, guidance: Tensor | None, x: Tensor, options: dict[str, Any]
    ) -> Prompt:
        """The references of a prompt, made when it is first seen."""
        for prompt in self.prompts:
            if prompt.serves(pooled, guidance):
                return prompt
        assert self.branches is not None  # groups without references are made before
        given = [bias > -math.inf for bias in self.run.biases]
        references = reference_pass(
            self.net,
            self.branches,
            [x if on else x[:0] for x, on in zip(self.run.latents, given, strict=True)],
            [x if on else x[:0] for x, on in zip(self.run.keep, given, strict=True)],
            guidance=guidance,
            pooled=pooled,
            like=x,
            attention=HeadAttention(options),
        )
        kept = (None if part is None else part.clone() for part in (pooled, guidance))
        self.prompts.append(Prompt(*kept, references))
        return self.prompts[-1]

    def _with_ours(self, model: Any, shape: list[int]) -> list[int]:
        """The latent's shape with rows for the tokens of subjects and router, and for the keys and
        values of the references."""
        net, run = self.net, self.run
        width = max(1, -(-shape[-1] // net.patch_size))
        tokens = sum(x.shape[0] for x in run.concepts if x is not None)
        tokens += 0 if run.router is None else run.router.tokens.shape[1]
        pictures = [
            int(mask.sum())
            for mask, bias in zip(run.keep, run.biases, strict=True)
            if bias > -math.inf
        ]
        blocks = len(net.double_blocks) + len(net.single_blocks)
        dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        size = 2 * blocks * sum(pictures) * net.hidden_size * dtype.itemsize
        row = [*shape[:-2], net.patch_size, shape[-1]]
        rows = math.ceil((tokens + sum(pictures)) / width)
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
