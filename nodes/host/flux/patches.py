"""The patch objects of one pass of FLUX, in the host's protocol.

They are put into the options of a pass when it begins, because only then all others are there, and
chain whatever occupies their slots. Attention or a block whose tokens are not those of the pass (a
ControlNet's, another pack's) goes on as it would without us.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.modules import attention as backends
from torch import Tensor

from ....anystory_core.bases.flux.call import FluxCall
from ....anystory_core.bases.flux.sites import FluxSite
from ..ids import OVERRIDE

Options = Mapping[str, Any]
_INSIDE = ("attn1_patch", "attn1_output_patch")  # newer hosts' places inside of a block
Replace = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class HeadAttention:
    """Attention of split heads as the host computes it, by its own choice of backend or by the
    override of another pack (``previous``: for the main sequence; it may be written for no other).
    Masked calls go to PyTorch's: SageAttention ignores a mask, FlashAttention fails on one, and the
    sub-quadratic backend copies it for every head.

    ``options`` are the pass's own."""

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


@dataclass
class BlockTable:
    """Finds the site of a running block, and says once a run what another pack took from us."""

    sites: Sequence[FluxSite]
    index: dict[tuple[str, int], FluxSite] = field(init=False)
    told: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        self.index = {(site.kind, site.number): site for site in self.sites}

    def running(self, options: Options) -> FluxSite | None:
        """The block that is running; None: what runs is no block of FLUX."""
        return self.index.get((options.get("block_type", ""), options.get("block_index", -1)))

    def warn(self, site: FluxSite, tokens: int, call: FluxCall) -> None:
        """Say that a block has other tokens than the pass."""
        if "tokens" not in self.told:
            self.told.add("tokens")
            logging.warning(
                "AnyStory: block '%s' has %d tokens, expected %d (another node changes them); it "
                "goes without the subjects.",
                site.label,
                tokens,
                call.layout.total,
            )

    def check(self, options: Options) -> None:
        """Say what of another pack's does not act in blocks that are ours."""
        for name in _INSIDE:
            if options.get("patches", {}).get(name) and name not in self.told:
                self.told.add(name)
                logging.warning(
                    "AnyStory: another node's '%s' does not act where the router decides; choose "
                    "the mode 'masks' in Subject Router to have it.",
                    name,
                )


@dataclass(frozen=True)
class AttentionOverride:
    """The attention of every block, with subjects and references.

    The host hands q, k and v (B,H,L,h) after norm and rotation."""

    table: BlockTable
    call: FluxCall
    previous: Any

    @torch.compiler.disable
    def __call__(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        site = self.table.running(kwargs.get("transformer_options") or {})
        if site is not None and kwargs.get("skip_reshape", False) and q.ndim == 4:
            if q.shape[0] == self.call.rows and q.shape[2] == k.shape[2] == self.call.layout.total:
                _enter(self.call, site)
                return self.call.attend(site.index, q, k, v, mask)
            self.table.warn(site, q.shape[2], self.call)
        if self.previous is not None:
            return self.previous(function, q, k, v, heads, mask, *args, **kwargs)
        return function(q, k, v, heads, mask, *args, **kwargs)


def _enter(call: FluxCall, site: FluxSite) -> None:
    if isinstance(call.attention, HeadAttention):
        call.attention.at(site)


@dataclass(frozen=True)
class BlockReplace:
    """One block's replacement, inside whatever another pack has put into the slot: our block where
    the router decides, else the host's. Packs with a copy of an older forward (TeaCache) hand their
    blocks no options, and the host's block goes on with ``options`` then."""

    table: BlockTable
    call: FluxCall
    site: FluxSite
    block: Any
    options: Options
    previous: Replace | None

    @torch.compiler.disable
    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        plain = extra["original_block"]

        def ours(given: dict[str, Any]) -> dict[str, Any]:
            if not self.call.routes_itself:
                return plain(given) if "transformer_options" in given else self._hosts(given)
            image, text = given["img"], given.get("txt")
            tokens = image.shape[1] + (0 if text is None else text.shape[1])
            if image.shape[0] != self.call.rows or tokens != self.call.layout.total:
                self.table.warn(self.site, tokens, self.call)
                return plain(given)
            _enter(self.call, self.site)
            return self._single(given) if text is None else self._double(given)

        if self.previous is not None:
            return self.previous(args, {**extra, "original_block": ours})
        return ours(args)

    def _hosts(self, args: dict[str, Any]) -> dict[str, Any]:
        site = self.site
        running = {"block_type": site.kind, "block_index": site.number}
        rest: dict[str, Any] = {
            "vec": args["vec"],
            "pe": args["pe"],
            "attn_mask": args.get("attn_mask"),
            "transformer_options": {**self.options, **running},
        }
        if site.kind == "single":
            return {"img": self.block(args["img"], **rest)}
        image, text = self.block(img=args["img"], txt=args["txt"], **rest)
        return {"img": image, "txt": text}

    def _double(self, args: dict[str, Any]) -> dict[str, Any]:
        text, image = self.call.double(
            self.site.number,
            self.block,
            args["txt"],
            args["img"],
            args["vec"],
            args["pe"],
            args.get("attn_mask"),
        )
        return {"txt": text, "img": image}

    def _single(self, args: dict[str, Any]) -> dict[str, Any]:
        x = self.call.single(
            self.site.number,
            self.block,
            args["img"],
            args["vec"],
            args["pe"],
            args.get("attn_mask"),
        )
        return {"img": x}


def installed(options: Options, table: BlockTable, net: Any, call: FluxCall) -> dict[str, Any]:
    """The options of a pass of ``net`` with the patches that serve ``call`` among the others."""
    if call.routes_itself:
        table.check(options)
    own = {**options, OVERRIDE: AttentionOverride(table, call, options.get(OVERRIDE))}
    out, replacements = dict(own), dict(options.get("patches_replace", {}))
    before: dict[Any, Replace] = replacements.get("dit", {})
    after = dict(before)
    for site in table.sites:
        block = net.get_submodule(site.host)
        after[site.slot] = BlockReplace(table, call, site, block, own, before.get(site.slot))
    out["patches_replace"] = {**replacements, "dit": after}
    return out
