"""What references at matched noise cost on SDXL, counted on the meta device: a step at 1024x1024
with guidance and one subject of one picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.injection.call import Call
from anystory_core.injection.keys import Candidates, KeyValue
from anystory_core.injection.matched import MatchedReferences, Picture, ReferenceInputs
from anystory_core.injection.prepare import PreparedSubjects, SiteConditions
from anystory_core.injection.rows import Rows
from anystory_core.routing.sources import SingleRoute
from anystory_core.training.hosts.sizes import diffusers_unet_config
from anystory_core.training.hosts.unet import UNetInputs, dense_attention, install, predict

CONFIG = AnyStoryConfig.sdxl()
SITES = build_sites(CONFIG.unet)
NOTHING = (SiteConditions(Candidates([None, None]), Candidates([None, None])),) * len(SITES)
IDLE = PreparedSubjects(NOTHING, SingleRoute(), (0.0, 0.0), (0.0, -torch.inf))


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.fixture(scope="module")
def sdxl() -> tuple[Any, Any]:
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel(**diffusers_unet_config(CONFIG.unet))
    return unet, install(unet, SITES)


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = run()
    return counter.get_total_flops(), out


def inputs(rows: int, side: int) -> UNetInputs:
    unet = CONFIG.unet
    text, pooled = meta(rows, 77, unet.context_dim), meta(rows, unet.pooled_dim)
    return UNetInputs(meta(rows, 4, side, side), meta(rows), text, pooled, meta(rows, 6))


def test_operations(sdxl: tuple[Any, Any]) -> None:
    unet, slot = sdxl
    plain, _ = counted(lambda: predict(unet, slot, None, inputs(2, 128)))
    picture = Picture(0, torch.zeros(4, 64, 64), None, None, None)
    matched = MatchedReferences((picture,), SITES, 1, 2048, 1280)

    def forward(given: ReferenceInputs, reading: Any) -> None:
        predict(unet, slot, reading, inputs(len(given.latents), 64))

    reading, found = counted(lambda: matched.read(1.0, forward, at_once=1))

    def step(references: dict[int, Candidates]) -> int:
        run = IDLE.with_references(references)
        call = Call(run, Rows((0,), (1,)), (1.0,), SITES, dense_attention)
        return counted(lambda: predict(unet, slot, call, inputs(2, 128)))[0]

    whole = step(found)

    def half(kv: KeyValue | None) -> KeyValue | None:
        return None if kv is None else KeyValue(*(x[:, : x.shape[1] // 2] for x in (kv.k, kv.v)))

    masked = step({index: Candidates([half(kv) for kv in part]) for index, part in found.items()})
    pass_ratio, ratio = reading / plain, (reading + whole) / plain
    print(f"plain {plain / 1e12:.2f} T, pass {pass_ratio:.4f}, with matched noise {ratio:.4f}, "
          f"features {whole / plain:.4f}, masked to a half {masked / plain:.4f}")  # fmt: skip
    assert 1 < masked / plain < whole / plain
    assert ratio <= 1.13
    # The pass ends at the last block's keys: a whole one would cost this much.
    entire, _ = counted(lambda: predict(unet, slot, None, inputs(1, 64)))
    assert reading < 0.96 * entire
