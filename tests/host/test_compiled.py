"""The host's torch.compile around an applied model: the subjects go into its graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scene import Scene, halves, module
from torch import Tensor


def compiled(model: Any) -> Any:
    """As the host's node does, up to the graph that code is generated from, which takes minutes."""
    out = model.clone()
    module("comfy_api.torch_helpers").set_torch_compile_wrapper(model=out, backend="aot_eager")
    return out


@pytest.mark.parametrize(
    ("mode", "long"), [("learned", True), ("text within masks", False)], ids=["long", "short"]
)
def test_one_graph(
    scene: Scene, counters: dict[str, Counter[str]], mode: str, long: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The U-Net is one graph, the third step needs no other, and the picture is what it is
    without: on rows that count as long, as all but a few of a real picture do, which a processor
    would sort by region were they not compiled, and on short ones."""
    if long:
        call = module("anystory_pack.anystory_core.injection.call")
        monkeypatch.setattr(call, "LEAST_SORTED", 1)
    routing = scene.route(mode=mode, masks=halves(), clip=scene.mini.clip)
    model, maps = scene.apply_with_maps(routing=routing)
    # What the host has on a GPU, where tokens are not sorted by region.
    backends = module("comfy.ldm.modules.attention")
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(backends, name, backends.attention_pytorch)
    wanted = scene.sample(model, steps=3)
    ids = _ids(maps, wanted)
    graphs: list[int] = []

    def count(run: Any, given: dict[str, Any]) -> Tensor:
        out = run(given["input"], given["timestep"], **given["c"])
        graphs.append(counters["stats"]["unique_graphs"])
        return out

    model = compiled(model)
    model.set_model_unet_function_wrapper(count)
    got = scene.sample(model, steps=3)
    assert graphs[0] == 1 and graphs[1] == graphs[2] <= 2  # masks are resized in the first step
    # Leaving the wrappers around the U-Net is all that breaks.
    assert all(
        "Skip inlining `torch.compiler.disable()`d" in why for why in counters["graph_break"]
    )
    assert torch.allclose(got, wanted, atol=1e-4)
    again = _ids(maps, got)
    assert again.keys() == ids.keys()
    same = [torch.equal(again[key], ids[key]) for key in ids]
    assert sum(same) > 0.95 * len(same)  # near ties may turn over


def _ids(maps: Any, latent: Tensor) -> dict[tuple[int, int], Tensor]:
    record = maps.find(latent).record
    return {(level.step, index): ids for level in record.levels for index, ids in level.ids.items()}
