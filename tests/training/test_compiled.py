"""torch.compile: a graph for each shape of a block, not for each block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.training import loop
from anystory_core.training.compiled import compile_blocks
from anystory_core.training.config import load_config
from anystory_core.training.hosts.sizes import diffusers_unet_config
from anystory_core.training.hosts.unet import UNetInputs, install, predict, time_ids
from anystory_core.training.loop import Trainer


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(graphs: list[int]) -> Any:
    def backend(module: Any, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return module.forward

    return backend


def graphs_of(depth: int) -> tuple[int, int, Tensor, Tensor]:
    """(graphs, blocks, compiled and plain prediction) of a U-Net of so many sites a transformer."""
    unet = replace(tiny.config().unet, transformer_depth=(0, depth, depth), middle_depth=depth)
    torch.manual_seed(0)
    net: Any = UNet2DConditionModel(**diffusers_unet_config(unet)).eval().requires_grad_(False)
    slot = install(net, build_sites(unet))
    g = torch.Generator().manual_seed(0)
    inputs = UNetInputs(
        torch.randn(1, 4, 8, 8, generator=g), torch.tensor([5]),
        torch.randn(1, 7, unet.context_dim, generator=g),
        torch.randn(1, unet.adm_channels - 1536, generator=g),
        time_ids(64, 64, 1, torch.device("cpu")),
    )  # fmt: skip
    with torch.no_grad():
        plain = predict(net, slot, None, inputs)
        graphs: list[int] = []
        blocks = compile_blocks(net, backend=counted(graphs))
        first = predict(net, slot, None, inputs)
        again = len(graphs)
        predict(net, slot, None, inputs)
    assert len(graphs) == again  # nothing is compiled twice
    return again, blocks, first, plain


def test_as_many_graphs_for_a_deep_network_as_for_a_shallow_one() -> None:
    shallow, few, _, _ = graphs_of(1)
    deep, many, compiled, plain = graphs_of(6)
    assert many - few > 20 and deep <= shallow
    assert shallow < few
    assert torch.allclose(compiled, plain, atol=1e-5)


def test_a_run_that_compiles(world: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses, and no block falls back after too many graphs."""
    graphs: list[int] = []
    monkeypatch.setattr(
        loop, "compile_blocks",
        lambda *networks: compile_blocks(*networks, backend=counted(graphs)),
    )  # fmt: skip
    kept = []
    for compiled in (False, True):
        path = tiny.run_toml(
            tmp_path / str(compiled), world.base, world.pairs, "subject", steps=3,
            run={"compile": compiled, "batch": 2, "checkpointing": True},
        )  # fmt: skip
        run = Trainer(load_config(path))
        run.run()
        kept.append(torch.cat([p.detach().flatten() for _, p in run.stage.trained()]))
    assert graphs and torch.allclose(*kept, atol=1e-4)
    steps = len(graphs)
    assert steps < 40
