"""The patch objects of one sampling run on FLUX, in the host's protocol.

They live in the guider's own copy of ``model_options`` while it samples, and chain whatever
occupies their slots. Which :class:`FluxCall` they serve comes with every forward pass in the
options; without one they step aside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules import attention as backends
from torch import Tensor

from ....anystory_core.bases.flux.call import FluxCall
from ....anystory_core.bases.flux.sites import FluxSite
from ..ids import CALL_KEY

Options = Mapping[str, Any]
OVERRIDE = "optimized_attention_override"  # the host's place for another attention
Replace = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class HeadAttention:
    """Attention of split heads as the host computes it, by its own choice of backend or by the
    override of another pack (``previous``: for the main sequence; it may be written for no other).
    Masked calls go to PyTorch's: SageAttention ignores a mask, FlashAttention fails on one, and the
    sub-quadratic backend copies it for every head.

    ``options`` are the pass's own without our call, which would hold itself by them."""

    options: dict[str, Any]
    previous: Any = None

    def at(self, site: FluxSite) -> None:
        """Say which block runs, for an override that asks."""
        self.options["block_type"], self.options["block_index"] = site.kind, site.number

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        options = {name: x for name, x in self.options.items() if name != OVERRIDE}
        heads = q.shape[1]
        if mask is not None:
            return backends.attention_pytorch(
                q, k, v, heads, mask=mask, skip_reshape=True, transformer_options=options
            )
        if self.previous is not None:
            options[OVERRIDE] = self.previous
        return backends.optimized_attention(
            q, k, v, heads, skip_reshape=True, transformer_options=options
        )


def _enter(call: FluxCall, site: FluxSite) -> None:
    if isinstance(call.attention, HeadAttention):
        call.attention.at(site)


@dataclass(frozen=True)
class AttentionOverride:
    """The attention of every block: with subjects and references where a call is under way.

    The host hands q, k and v (B,H,L,h) after norm and rotation. Attention that is not that of a
    FLUX block's whole sequence (a ControlNet's, another pack's) goes on as it would without us."""

    sites: Mapping[tuple[str, int], FluxSite]
    previous: Any

    @torch.compiler.disable
    def __call__(
        self, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int,
        mask: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        options: Options = kwargs.get("transformer_options") or {}
        call: FluxCall | None = options.get(CALL_KEY)
        site = self.sites.get((options.get("block_type", ""), options.get("block_index", -1)))
        fits = (
            call is not None
            and site is not None
            and kwargs.get("skip_reshape", False)
            and q.ndim == 4
            and q.shape[2] == k.shape[2] == call.layout.total
        )
        if call is None or site is None or not fits:
            if self.previous is not None:
                return self.previous(function, q, k, v, heads, mask, *args, **kwargs)
            return function(q, k, v, heads, mask, *args, **kwargs)
        _enter(call, site)
        return call.attend(site.index, q, k, v, mask)


@dataclass(frozen=True)
class BlockReplace:
    """One block's replacement: by ours where the router decides, inside whatever another pack has
    put into the slot."""

    site: FluxSite
    block: Any
    previous: Replace | None

    @torch.compiler.disable
    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options: Options = args.get("transformer_options") or {}
        call: FluxCall | None = options.get(CALL_KEY)
        if call is not None and call.routes_itself:
            _enter(call, self.site)
            ours = self._double if self.site.kind == "double" else self._single
            extra = {**extra, "original_block": lambda given: ours(call, given)}
        if self.previous is not None:
            return self.previous(args, extra)
        return extra["original_block"](args)

    def _double(self, call: FluxCall, args: dict[str, Any]) -> dict[str, Any]:
        text, image = call.double(
            self.site.number,
            self.block,
            args["txt"],
            args["img"],
            args["vec"],
            args["pe"],
            args.get("attn_mask"),
        )
        return {"txt": text, "img": image}

    def _single(self, call: FluxCall, args: dict[str, Any]) -> dict[str, Any]:
        x = call.single(
            self.site.number, self.block, args["img"], args["vec"], args["pe"],
            args.get("attn_mask"),
        )  # fmt: skip
        return {"img": x}


def install(
    transformer_options: dict[str, Any], sites: Sequence[FluxSite], net: Any, *, routed: bool
) -> Any:
    """Put one run's patches into ``transformer_options`` (the guider's own nested copy); returns
    the override that stood there before. ``routed``: the router may decide, so blocks need a
    replacement."""
    previous = transformer_options.get(OVERRIDE)
    table = {(site.kind, site.number): site for site in sites}
    transformer_options[OVERRIDE] = AttentionOverride(table, previous)
    if routed:
        replacements = transformer_options.setdefault("patches_replace", {})
        before: dict[Any, Replace] = replacements.get("dit", {})
        after = dict(before)
        for site in sites:
            block = net.get_submodule(site.host)
            after[site.slot] = BlockReplace(site, block, before.get(site.slot))
        replacements["dit"] = after
    return previous
