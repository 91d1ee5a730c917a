"""The passes of an SDXL-like U-Net in one sampling run: what is prepared before, and the wrappers
that give each forward pass its :class:`~....anystory_core.injection.call.Call`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ....anystory_core.injection.call import Call, Recording, Shown
from ....anystory_core.injection.prepare import PreparedSubjects, prepare_subjects
from ....anystory_core.injection.rows import Rows
from ....anystory_core.routing.agreement import BLANK
from ....anystory_core.routing.grids import Crop
from ....anystory_core.routing.modes import build_source, source_of_run
from ....anystory_core.subject.grounding import ground_subjects
from ....anystory_core.subject.subject import Subject, subjects_of
from ..base import Entry, RunRequest
from ..conds import Roles
from ..ids import ALONE_KEY, CALL_KEY, RUN_KEY
from ..managed import load, release
from ..passes import RunPasses
from ..texts import route_texts
from ..windows import Window
from .matched import Level, MatchedPass
from .patcher import (
    BlockTable,
    HostAttention,
    Replacements,
    RoutedAttention,
    installed,
    replaced_since,
    replacements,
)


@dataclass(kw_only=True)
class UNetPasses(RunPasses):
    """The passes of a U-Net in one sampling run: the inner wrappers, and what they share."""

    prepared: PreparedSubjects
    windows: tuple[Window, ...]
    precision: Any  # of attention, where the user forces one
    table: BlockTable
    replaced: Replacements  # what stood in the blocks' slots when the run began
    blank_from: float  # the noise level above which little but noise is to be seen
    matched: MatchedPass | None = None  # where references are read at each noise level

    # The wrappers, outermost first.

    def calc_cond_batch(
        self,
        executor: Callable[..., Any],
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
    ) -> Any:
        """Also tells the calls inside what other packs replaced for this evaluation alone."""
        options = dict(model_options.get("transformer_options", {}))
        if options.get(RUN_KEY) is self:
            options[ALONE_KEY] = replaced_since(self.replaced, options)
        model_options = {**model_options, "transformer_options": options}
        return super().calc_cond_batch(executor, model, conds, x, timestep, model_options)

    @torch.compiler.disable(recursive=False)
    def diffusion_model(
        self, executor: WrapperExecutor, entry: Entry, *args: Any, **kwargs: Any
    ) -> Any:
        """Puts a fresh :class:`Call` and the patches that ask it into the options of this pass."""
        position = 5  # x, timesteps, context, y, control, transformer_options
        values = list(args)
        options = values[position] if len(values) > position else kwargs["transformer_options"]
        y = values[3] if len(values) > 3 else kwargs.get("y")
        level = Level(executor.original, executor.class_obj, values[0], values[1], y)
        call, patched = self._patched(options, level, values[2], entry)
        if len(values) > position:
            values[position] = patched
        else:
            kwargs["transformer_options"] = patched
        out = executor(*values, **kwargs)
        if call is not None:
            self._record(call)
        return out

    @torch.compiler.disable
    def _record(self, call: Call) -> None:
        call.record()

    @torch.compiler.disable
    def _patched(
        self, options: dict[str, Any], level: Level, context: Tensor, entry: Entry
    ) -> tuple[Call | None, dict[str, Any]]:
        """The call of a pass of the U-Net, and options with the patches that ask it; the given ones
        where nothing acts."""
        call = self._begin(options, level, entry)
        if call is None:
            return None, options
        # Where another pack gives text states of more rows than x has (NAG), attn2 is its own.
        late = context.shape[0] != level.x.shape[0]
        patched = installed(options, self.table, level.unet, late=late)
        return call, {**patched, CALL_KEY: call}

    def _begin(self, options: dict[str, Any], level: Level, entry: Entry) -> Call | None:
        x = level.x
        sigma = self.sigma(options)
        factors = tuple(window.factor(sigma) for window in self.windows)
        active = tuple(factor > 0 for factor in factors)
        if self.prepared.is_idle(factors):
            self.record.call(sigma, active)
            return None
        evaluation = self.evaluation(options)
        conds = self.conds_of(options, x, self.prepared.source.pictures)
        recording = self.recording(options, x, conds, entry, active)
        cond: list[int] = []
        uncond: list[int] = []
        crops: list[Crop | None] = [None] * x.shape[0]
        apart: list[int] = []
        routed: list[tuple[int, Any, Crop | None]] = []
        for each in conds:
            (cond if each.conditional else uncond).extend(each.rows)
            if each.conditional or self.prepared.keep_references_in_uncond:
                routed.append((each.number, each.uuid, each.crop))
            for row, view in zip(each.rows, each.views, strict=True):
                crops[row] = view
            if each.apart:
                apart.extend(each.rows)
        if entry.passes == 0:
            entry.kind = evaluation.kind(routed, len(conds[0].rows), x)
        entry.passes += 1
        prepared = self.prepared
        routed_rows = cond + (uncond if prepared.keep_references_in_uncond else [])
        if self.matched is not None and routed_rows and self.matched.window.holds(sigma):
            prepared = self.matched.prepared_at(prepared, level, sigma, routed_rows[0], options)
        call = Call(
            prepared,
            Rows(tuple(cond), tuple(uncond)),
            factors,
            self.record.sites,
            RoutedAttention(options, self.precision),
            Shown(
                crops=tuple(crops) if any(crops) else (),
                apart=tuple(apart),
                # A tile of a picture need not show the subject.
                blank=sigma >= self.blank_from and not evaluation.is_tile(None, x),
                kind=entry.kind,
                again=entry.passes > 1,
            ),
            None if recording is None else Recording(*recording),
            plain=HostAttention(options, self.precision),
        )
        if recording is not None:
            recording[0].level.everywhere = call.everywhere
        return call


def windows_of(request: RunRequest) -> tuple[Window, ...] | None:
    """Percents become noise levels: own window and overall window together. None: all strengths
    are 0 or all windows empty, so that the model must run as if we were not there."""
    settings, subjects = request.settings, request.routing.subjects
    sampling = request.guider.model_patcher.get_model_object("model_sampling")
    windows = tuple(
        Window.of(subject.options, request.start, request.end, sampling) for subject in subjects
    )
    acts = any(
        window.start > window.end
        and max(subject.options.at_start, subject.options.at_end) > 0
        and (
            settings.strength * subject.options.strength > 0
            or settings.reference_strength * subject.options.reference_strength > 0
        )
        for subject, window in zip(subjects, windows, strict=True)
    )
    return windows if acts else None


def prepare_passes(request: RunRequest, windows: tuple[Window, ...]) -> UNetPasses:
    """Project the subjects for a run, unless an earlier one has."""
    routing, guider, kept = request.routing, request.guider, request.kept
    model = guider.model_patcher
    if kept is not None and kept.prepared is not None:
        earlier = kept.prepared
        source = source_of_run(earlier.source, routing.mode, routing.masks)
        prepared = replace(earlier, source=source)
        request.advance(2)
    else:
        prepared = _project(request)
        if kept is not None:
            kept.prepared = prepared
    table = BlockTable(request.record.sites)
    return UNetPasses(
        record=request.record,
        roles=Roles.of(guider),
        prepared=prepared,
        windows=windows,
        precision=_attention_precision(model.model.diffusion_model),
        table=table,
        replaced=replacements(guider.model_options["transformer_options"]),
        blank_from=float(model.get_model_object("model_sampling").percent_to_sigma(BLANK)),
        matched=None
        if prepared.matched is None
        else MatchedPass.of(guider, prepared.matched, table),
    )


def _project(request: RunRequest) -> PreparedSubjects:
    routing, guider, advance = request.routing, request.guider, request.advance
    anystory = routing.anystory
    subjects = subjects_of(Subject, routing.subjects, anystory.model.fingerprint)
    model = guider.model_patcher
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    device = model.load_device
    texts = None
    if routing.mode.startswith("text"):
        texts = route_texts(routing.labels, guider, device)
    # Only tokens that know their places are made here: the others were made with the subject.
    grounded = any(subject.states is not None for subject in subjects)
    asked = (("encoder", grounded), ("routers", routing.mode.startswith("learned")))
    used = anystory.having("projections", *(name for name, is_used in asked if is_used))
    load(used)
    advance(1)
    try:
        moved = [s.map(lambda x: x.to(device, dtype)) for s in subjects]
        moved = ground_subjects(anystory.model, routing.mode, moved, routing.masks)
        source = build_source(
            routing.mode, anystory.model, moved, routing.masks, texts, routing.text_block
        )
        agree = routing.agree and routing.mode == "learned"
        prepared = prepare_subjects(anystory.model, moved, source, request.settings, agree=agree)
    finally:
        release(used)
    advance(1)
    return prepared


def _attention_precision(unet: Any) -> Any:
    """The U-Net's own attention precision (None unless the user forces upcasting)."""
    for module in unet.modules():
        if hasattr(module, "attn_precision"):
            return module.attn_precision
    return None
