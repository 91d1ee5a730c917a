"""The patch objects of one pass of the U-Net, at the points of a block and in the host's protocol.

They are put into the options of a pass when it begins, because only then all others are there:
those of the model, of the evaluation, of a cond's hooks, of other packs' wrappers; and they chain
whatever occupies their slots. Which :class:`Call` they serve lies in the same options. A compiled
U-Net takes them into its graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy import model_management as mm
from comfy.ldm.modules import attention as backends
from comfy.ops import scaled_dot_product_attention
from torch import Tensor

from ....anystory_core.bases.sdxl.sites import UNetSite
from ....anystory_core.injection.call import Call
from ....anystory_core.injection.matched import ReferencePass
from ....anystory_core.routing.grids import Grid
from ..ids import ALONE_KEY, CALL_KEY, OVERRIDE, STATES_KEY

Options = Mapping[str, Any]
Serves = Call | ReferencePass  # under CALL_KEY
Replace = Callable[[Tensor, Tensor, Tensor, Options], Tensor]

# Whether the processor has instructions for it; older versions of PyTorch do not say.
_CAN = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
MULTIPLIES_BFLOAT16 = bool(_CAN.get("avx512_bf16") or _CAN.get("amx_bf16"))


@dataclass(frozen=True)
class HostAttention:
    """Dense attention as the host computes it, with its own choice of backend."""

    options: Options
    precision: Any = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        return backends.optimized_attention(
            q, k, v, heads, mask,
            attn_precision=self.precision, transformer_options=self.options,
        )  # fmt: skip


@dataclass(frozen=True)
class RoutedAttention:
    """Dense attention to the subjects: the host's, except that masked calls never go to
    SageAttention, which takes a mask and ignores it (the host itself avoids that only in newer
    versions), nor to FlashAttention, which fails on one and says so in the log at every call, nor
    to another pack's override, which mostly is SageAttention, nor to the sub-quadratic way where it
    would take the keys in parts: it measures scores against the largest one of a part, masked or
    not, so that a row whose own keys score much less (18 in half precision) is 0 / 0.

    They go to PyTorch's own attention then. So do all calls on a CPU, whose memory it does not
    fill either, but those in bfloat16 without a mask where the CPU multiplies it: the sub-quadratic
    way takes half as long for these, otherwise up to five times as long in float32 and thirty times
    in half precision."""

    options: Options
    precision: Any = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        if _slow_at_host(q) or (mask is not None and _goes_to_pytorch(q, k, heads)):
            return _pytorch_attention(q, k, v, heads, mask)
        if mask is None:
            return HostAttention(self.options, self.precision)(q, k, v, heads)
        options = {name: x for name, x in self.options.items() if name != OVERRIDE}
        return backends.optimized_attention_masked(
            q, k, v, heads, mask, attn_precision=self.precision, transformer_options=options
        )


def on_cpu(x: Tensor) -> bool:
    """Whether a tensor is in the processor's own memory."""
    return x.device.type == "cpu"


def _slow_at_host(q: Tensor) -> bool:
    """Whether the host's own choice of attention would be a slow one for calls like ours."""
    return on_cpu(q) and not (q.dtype == torch.bfloat16 and MULTIPLIES_BFLOAT16)


def _goes_to_pytorch(q: Tensor, k: Tensor, heads: int) -> bool:
    """Whether masked attention leaves the host's choice of backend."""
    attention = backends.optimized_attention_masked
    if mm.sage_attention_enabled() or mm.flash_attention_enabled():
        return True
    if attention is backends.attention_sub_quad:
        return not _holds_all_keys(q, k, heads)
    return attention is backends.attention_pytorch


def _pytorch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    rows, width = q.shape[0], q.shape[2] // heads
    q, k, v = (x.view(rows, -1, heads, width).transpose(1, 2) for x in (q, k, v))
    every_head = None if mask is None else mask.unsqueeze(1)
    out = scaled_dot_product_attention(q, k, v, attn_mask=every_head)
    return out.transpose(1, 2).reshape(rows, -1, heads * width)


def _holds_all_keys(q: Tensor, k: Tensor, heads: int) -> bool:
    """Whether free memory lets the sub-quadratic way take all keys of (B,K,D) at once, for as many
    queries as it takes at most: the host's own rule, on its safe side. In half precision never: the
    host may count scores in float32 or not."""
    if q.dtype != torch.float32:
        return False
    free = mm.get_free_memory(q.device, True)[0]
    return free >= q.shape[0] * heads * k.shape[1] * q.element_size() * 4096 * 4


@dataclass
class BlockTable:
    """Finds the site of a running block, and its token grid."""

    sites: Sequence[UNetSite]
    index: dict[tuple[str, int, int], int] = field(init=False)
    warned: set[tuple[int, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.index = {(s.part, s.number, s.block_index): s.index for s in self.sites}

    def site(self, options: Options) -> int:
        """Number l of the block that is running."""
        part, number = options["block"][:2]
        return self.index[part, number, options.get("block_index", 0)]

    def grid(self, options: Options, x: Tensor) -> Grid | None:
        """(h,w) of the tokens of x; None when another pack changed its rows or tokens."""
        batch, _, height, width = options["activations_shape"]
        fits = x.shape[1] == height * width and x.shape[0] == batch
        return (height, width) if fits else None

    def warn(self, options: Options, x: Tensor, index: int, lost: str) -> None:
        """Say, once a run, what a block with a changed x goes without."""
        if (index, lost) in self.warned:
            return
        self.warned.add((index, lost))
        batch, _, height, width = options["activations_shape"]
        logging.warning(
            "AnyStory: block '%s' has %d rows of %d tokens for %d of a grid of %dx%d (another node "
            "changes them); %s.",
            self.sites[index - 1].label,
            *x.shape[:2],
            batch,
            height,
            width,
            lost,
        )


@dataclass(frozen=True)
class RoutePatch:
    """attn2 input patch: the router reads ``norm2``'s output. With others in its slot, which may
    change the rows, it keeps that output for the block's other patches."""

    table: BlockTable
    others: bool

    def __call__(
        self, n: Tensor, context: Tensor, value: Tensor, options: MutableMapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        call: Serves | None = options.get(CALL_KEY)
        if call is not None:
            grid = self.table.grid(options, n)
            if grid is not None:
                call.begin_cross_attention(self.table.site(options), n, grid)
                if self.others:
                    options[STATES_KEY] = n
        return n, context, value


@dataclass(frozen=True)
class CrossAttentionPatch:
    """attn2 replacement: the text's part by whoever was in the slot, then Eq. 5; which is left to
    :class:`LatePatch` where another pack runs attn2 with rows of its own."""

    table: BlockTable
    previous: Replace | None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, options: MutableMapping[str, Any], **_: Any
    ) -> Tensor:
        text = _plain(self.previous, q, k, v, options)
        call: Serves | None = options.get(CALL_KEY)
        if call is None:
            return text
        index = self.table.site(options)
        if self.table.grid(options, q) is not None:
            options.pop(STATES_KEY, None)
            return call.cross_attention(index, q, text)
        if STATES_KEY not in options:
            self.table.warn(options, q, index, "it goes without the subjects")
        return text


@dataclass(frozen=True)
class LatePatch:
    """attn2 output patch: Eq. 5 for a block whose rows another pack multiplied, one for each of its
    prompts (Attention Couple), when that pack has put them together again."""

    table: BlockTable
    unet: Any

    def __call__(self, out: Tensor, options: MutableMapping[str, Any]) -> Tensor:
        call: Serves | None = options.get(CALL_KEY)
        states: Tensor | None = options.pop(STATES_KEY, None)
        if call is None or states is None:
            return out
        index = self.table.site(options)
        if self.table.grid(options, out) is None:
            self.table.warn(options, out, index, "it goes without the subjects")
            return out
        attn2 = self.unet.get_submodule(self.table.sites[index - 1].ldm).attn2
        q = attn2.to_q(states)
        term = call.cross_attention(index, q, torch.zeros_like(q))
        # The other pack's rows have been through to_out, bias included.
        return out + (attn2.to_out(term) - attn2.to_out(torch.zeros_like(term[:1, :1])))


@dataclass(frozen=True)
class SelfAttentionPatch:
    """attn1 replacement: Eq. 6-8. Where another replacement stands in the slot, its output changes
    by what the references change in plain attention."""

    table: BlockTable
    previous: Replace | None
    attended: set[int]  # blocks of this pass that have attended with all their rows

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: Options, **_: Any) -> Tensor:
        call: Serves | None = options.get(CALL_KEY)
        routed = None
        if call is not None:
            index = self.table.site(options)
            grid = self.table.grid(options, q)
            if grid is None or k.shape[0] != q.shape[0]:
                # Reference-only control runs the unconditional rows once more on their own.
                if index not in self.attended or q.shape[0] != call.plain_rows:
                    self.table.warn(options, q, index, "it goes without the subjects' references")
            else:
                self.attended.add(index)
                # The block's own keys may be more than its tokens (reference-only control).
                routed = call.self_attention(index, q, k, v, grid)
        if routed is None:
            return _plain(self.previous, q, k, v, options)
        if self.previous is None:
            return routed
        return self.previous(q, k, v, options) + (routed - _plain(None, q, k, v, options))


def _plain(previous: Replace | None, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """The block's attention as it would be without us."""
    if previous is not None:
        return previous(q, k, v, options)
    attention = HostAttention(options, options.get("attn_precision"))
    return attention(q, k, v, options["n_heads"])


Slot = tuple[str, tuple[Any, ...]]  # attn1 or attn2, and the place of a block or its layer
Replacements = Mapping[Slot, Replace]


def replacements(transformer_options: Options) -> Replacements:
    """Every replacement of attention in some options, by its slot."""
    return {
        (name, place): replace
        for name, found in transformer_options.get("patches_replace", {}).items()
        for place, replace in found.items()
    }


def replaced_since(before: Replacements, transformer_options: Options) -> frozenset[Slot]:
    """Slots with another replacement than ``before``."""
    now = replacements(transformer_options)
    return frozenset(slot for slot, replace in now.items() if before.get(slot) is not replace)


def installed(options: Options, table: BlockTable, unet: Any, *, late: bool) -> dict[str, Any]:
    """The options of a pass of ``unet`` with our patches among the others.

    A slot is (name, number, index) or (name, number), and the host looks at the first form first.
    So ours goes where another's triple stands, chaining it, and on the pair elsewhere, chaining
    that. What another pack has put into a slot to evaluate the model once more without a part of
    its attention (PAG, SAG) stays alone there. Of the patches around attn2 ours read first and add
    last: the block's own rows. ``late``: attn2 is left to the block, and Eq. 5 added to its output.
    """
    out = dict(options)
    patches = out["patches"] = dict(options.get("patches", {}))
    others = patches.get("attn2_patch", ())
    patches["attn2_patch"] = [RoutePatch(table, late or bool(others)), *others]
    if late or others:
        after_attn2 = patches.get("attn2_output_patch", ())
        patches["attn2_output_patch"] = [*after_attn2, LatePatch(table, unet)]
    replace = out["patches_replace"] = dict(options.get("patches_replace", {}))
    alone: frozenset[Slot] = options.get(ALONE_KEY, frozenset())
    kinds: dict[str, Callable[[Replace | None], Replace]] = {
        "attn1": partial(SelfAttentionPatch, table, attended=set()),
        "attn2": partial(CrossAttentionPatch, table),
    }
    if late:
        del kinds["attn2"]
    for name, kind in kinds.items():
        before: dict[Any, Replace] = replace.get(name, {})
        after = dict(before)
        for site in table.sites:
            pair = (site.part, site.number)
            triple = (*pair, site.block_index)
            place = triple if triple in before else pair
            if (name, place) not in alone:
                after[place] = kind(before.get(place))
        replace[name] = after
    return out
