"""AnyStorySplitMasks: a batch of masks from a detector -> one mask for each subject."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..anystory_core.errors import RoutingError
from .host import ids

ORDERS = ("as given", "left to right", "largest first")


def in_order(masks: Tensor, order: str) -> Tensor:
    """Masks (M,H,W) in one of ORDERS; where two are equal in it, as given."""
    if order == "as given":
        return masks
    area = masks.sum(dim=(1, 2))
    if order == "largest first":
        return masks[area.argsort(descending=True, stable=True)]
    if order != "left to right":
        raise RoutingError(f"order: got {order!r}, expected one of {list(ORDERS)}")
    places = torch.arange(masks.shape[2], dtype=masks.dtype, device=masks.device)
    middle = (masks.sum(dim=1) * places).sum(dim=1) / area.clamp_min(1e-6)
    return masks[middle.argsort(stable=True)]


class AnyStorySplitMasks(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="AnyStorySplitMasks",
            display_name="AnyStory Split Masks",
            category=ids.CATEGORY,
            description="Takes a batch of masks apart, as a detector gives it: one mask for each "
            "subject of Subject Router.",
            inputs=[
                io.Mask.Input("masks", tooltip="A batch of masks, one for each thing found."),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=ORDERS[0],
                    tooltip="Which mask comes first: as given, from left to right by their "
                    "middles, or by their size.",
                ),
            ],
            outputs=[
                io.Mask.Output(f"mask_{number}", display_name=f"mask_{number}")
                for number in range(1, ids.MAX_SUBJECTS + 1)
            ],
        )

    @classmethod
    @ids.named_errors
    def execute(cls, masks: Tensor, order: str = ORDERS[0]) -> io.NodeOutput:
        stacked = masks if masks.ndim == 3 else masks.reshape(-1, *masks.shape[-2:])
        sorted_ = in_order(stacked, order)
        outputs: list[Any] = [mask[None] for mask in sorted_[: ids.MAX_SUBJECTS]]
        for number in range(len(outputs) + 1, ids.MAX_SUBJECTS + 1):
            outputs.append(
                ExecutionBlocker(
                    f"AnyStorySplitMasks: mask_{number} is connected, but masks has only "
                    f"{len(stacked)}; let the detector find more, or take that subject away"
                )
            )
        return io.NodeOutput(*outputs)
