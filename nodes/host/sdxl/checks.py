"""Do the AnyStory weights fit the host's model? Said before anything is loaded or patched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....anystory_core.bases.sdxl.config import AnyStoryConfig
from ....anystory_core.bases.sdxl.sites import UNetSite
from ....anystory_core.errors import ModelMismatchError
from ..tensors import check_latent_format


def _transformer_blocks(diffusion_model: Any) -> dict[tuple[str, int, int], Any]:
    """(part, number, index) -> transformer block of the host's U-Net."""
    found: dict[tuple[str, int, int], Any] = {}
    layers = [("input", i, b) for i, b in enumerate(getattr(diffusion_model, "input_blocks", ()))]
    layers += [("middle", 0, getattr(diffusion_model, "middle_block", None) or ())]
    layers += [
        ("output", i, b) for i, b in enumerate(getattr(diffusion_model, "output_blocks", ()))
    ]
    for part, number, block in layers:
        for layer in block:
            for index, inner in enumerate(getattr(layer, "transformer_blocks", ())):
                found[part, number, index] = inner
    return found


def check_model(model: Any, config: AnyStoryConfig, sites: Sequence[UNetSite]) -> None:
    """ModelMismatchError naming the first block and dimension of the host's model that differ, or
    the scale of its latents."""
    _check_blocks(model, config, sites)
    remedy = f"load a checkpoint of the family {config.name!r}"
    check_latent_format(model, config.reference, remedy)


def _check_blocks(model: Any, config: AnyStoryConfig, sites: Sequence[UNetSite]) -> None:
    kind = type(model.model).__name__
    diffusion_model = getattr(model.model, "diffusion_model", None)
    blocks = _transformer_blocks(diffusion_model)
    if not blocks:
        raise ModelMismatchError(
            f"model: {kind} has no transformer blocks of SDXL's kind; these AnyStory weights are "
            f"for {config.name!r}, load a checkpoint of that family"
        )
    if len(blocks) != len(sites):
        raise ModelMismatchError(
            f"model: {kind} has {len(blocks)} transformer blocks, these AnyStory weights "
            f"({config.name!r}) expect {len(sites)}; load a checkpoint of that family"
        )
    for site in sites:
        block = blocks.get((site.part, site.number, site.block_index))
        if block is None:
            raise ModelMismatchError(
                f"model: {kind} has no block '{site.label}', which these AnyStory weights "
                f"({config.name!r}) expect; load a checkpoint of that family"
            )
        expected = {
            "width": (block.attn1.to_q.weight.shape[1], site.channels),
            "heads": (block.n_heads, site.heads),
            "text width": (block.attn2.to_k.weight.shape[1], config.unet.context_dim),
        }
        for what, (got, wanted) in expected.items():
            if got != wanted:
                raise ModelMismatchError(
                    f"model: {kind} has {what} {got} at block '{site.label}', these AnyStory "
                    f"weights ({config.name!r}) expect {wanted}; load a checkpoint of that family"
                )
