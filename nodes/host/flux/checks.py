"""Do the AnyStory weights fit the host's FLUX? Said before anything is loaded or patched."""

from __future__ import annotations

import logging
from typing import Any

from ....anystory_core.bases.flux.config import FluxConfig
from ....anystory_core.errors import ModelMismatchError
from ..tensors import check_latent_format

_REMEDY = "load FLUX.1-dev"


def check_model(model: Any, config: FluxConfig) -> None:
    """ModelMismatchError naming what of the host's model differs. A model that the weights fit, but
    were not trained on (schnell), gets a line in the log."""
    kind = type(model.model).__name__
    net = getattr(model.model, "diffusion_model", None)
    params = getattr(net, "params", None)
    if not hasattr(net, "double_blocks") or not hasattr(net, "single_blocks") or params is None:
        raise ModelMismatchError(
            f"model: {kind} has no blocks of FLUX's kind; these AnyStory weights are for "
            f"{config.name!r} (FLUX.1-dev), {_REMEDY}, or AnyStory weights of that model's family"
        )
    if getattr(params, "global_modulation", False) or not hasattr(
        net.double_blocks[0] if len(net.double_blocks) else None, "img_mod"
    ):
        raise ModelMismatchError(
            f"model: {kind} modulates all blocks at once, as FLUX.2 and Chroma do; these AnyStory "
            f"weights are for FLUX.1-dev; {_REMEDY}"
        )
    sizes = config.transformer
    expected = {
        "width": (net.hidden_size, sizes.width),
        "heads": (net.num_heads, sizes.heads),
        "double blocks": (len(net.double_blocks), sizes.double_blocks),
        "single blocks": (len(net.single_blocks), sizes.single_blocks),
        "text width": (params.context_in_dim, sizes.context_dim),
        "patch size": (net.patch_size, sizes.patch_size),
    }
    for what, (got, wanted) in expected.items():
        if got != wanted:
            raise ModelMismatchError(
                f"model: {kind} has {what} {got}, these AnyStory weights ({config.name!r}) expect "
                f"{wanted}; {_REMEDY}"
            )
    if net.in_channels != sizes.token_width:
        raise ModelMismatchError(
            f"model: {kind} takes {net.in_channels} numbers in a token, these AnyStory weights "
            f"expect {sizes.token_width}: it is a Fill, Canny or Depth model, or has a control "
            f"LoRA; {_REMEDY}"
        )
    check_latent_format(model, config.reference, _REMEDY)
    if not params.guidance_embed:
        logging.warning(
            "AnyStory: %s has no guidance, as FLUX.1-schnell; the AnyStory weights were trained on "
            "FLUX.1-dev, expect less likeness.",
            kind,
        )
