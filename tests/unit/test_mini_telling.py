"""What the base is asked about places: the router's question, about the right rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.mini.config import CONFIG
from lab.networks.base import build_unet, size_ids
from lab.networks.telling import Teller, describe, look_width

BATCH, SIDE = 3, 16


@pytest.fixture
def watched() -> tuple[Any, Teller]:
    torch.manual_seed(0)
    unet, teller = build_unet(), Teller(CONFIG)
    teller.watch(unet, build_sites(CONFIG.unet))
    return unet, teller


def run(unet: Any) -> None:
    g = torch.Generator().manual_seed(1)
    added = {
        "text_embeds": torch.randn(BATCH, CONFIG.unet.context_dim, generator=g),
        "time_ids": size_ids(BATCH),
    }
    latents = torch.randn(BATCH, 4, SIDE, SIDE, generator=g)
    text = torch.randn(BATCH, 7, CONFIG.unet.context_dim, generator=g)
    unet(latents, torch.tensor([100, 500, 900]), text, added_cond_kwargs=added)


def looks() -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(2, 2, look_width(CONFIG), generator=g)


def places() -> Tensor:
    """Two subjects in the first picture, one in the second."""
    subjects = torch.zeros(2, 2, SIDE, SIDE)
    subjects[0, 0, :7, 3:9] = 1
    subjects[0, 1, 8:12] = 0.4  # a token goes to what covers most of it
    subjects[1, 0, 9:, 8:] = 1
    return subjects


@torch.no_grad()
def naive(teller: Teller, hidden: list[Tensor], looks: Tensor, subjects: Tensor) -> float:
    """Cross-entropy in float64, token by token, and the squared error of each subject's map by what
    both maps cover."""
    look, background = teller.look.double()(looks.double()), teller.background.double()
    total = 0.0
    for z, key, head in zip(hidden, teller.keys.double(), teller.hidden.double(), strict=True):
        side, block = math.isqrt(z.shape[1]), 0.0
        step = SIDE // side
        for row in range(2):
            maps: list[list[float]] = []
            wanted: list[int] = []
            own = [i for i in range(2) if bool(subjects[row, i].any())]
            asked = [*(look[row, i] for i in own), background, look[1 - row, 0]]
            for token in range(side * side):
                y, x = (step * place for place in divmod(token, side))
                shares = [float(subjects[row, i, y : y + step, x : x + step].mean()) for i in own]
                shares.append(max(0.0, 1 - sum(shares)))
                wanted.append(shares.index(max(shares)))
                scores = key(torch.stack(asked)) @ head(z[row, token].double()) / 8
                block -= float(scores.log_softmax(0)[wanted[-1]]) / (2 * side * side)
                maps.append(scores.softmax(0).tolist())
            for i in range(len(own)):
                pairs = [(m[i], float(w == i)) for m, w in zip(maps, wanted, strict=True)]
                square = sum((m - w) ** 2 for m, w in pairs)
                covered = sum(m**2 + w**2 for m, w in pairs)
                block += square / (1 + covered) / (2 * len(own))
        total += block
    return total / len(hidden)


def test_a_token_chooses_between_subjects_background_and_an_absent_one(
    watched: tuple[Any, Teller],
) -> None:
    unet, teller = watched
    torch.nn.init.normal_(teller.background)
    hidden: list[Tensor] = []
    for site in build_sites(CONFIG.unet):
        norm = unet.get_submodule(site.diffusers).norm2
        norm.register_forward_hook(lambda _, __, output: hidden.append(output.detach()[1:]))
    run(unet)
    asked = teller.loss(slice(1, 3), looks(), places())
    wanted = naive(teller, hidden, looks(), places())
    assert float(asked.detach()) == pytest.approx(wanted, rel=1e-5)


def test_being_asked_trains_the_base(watched: tuple[Any, Teller]) -> None:
    """Gradients reach the first convolution; every pass is asked about once."""
    unet, teller = watched
    for _ in range(2):
        run(unet)
        teller.loss(slice(1, 3), looks(), places()).backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError):  # nothing was seen since
        teller.loss(slice(1, 3), looks(), places())


def test_a_description_is_the_class_token_and_the_mean_patch() -> None:
    states = torch.randn(2, 257, CONFIG.clip.width, generator=torch.Generator().manual_seed(3))
    found = describe(states)
    assert found.shape == (2, look_width(CONFIG))
    assert torch.equal(found[:, : CONFIG.clip.width], states[:, 0])
    wanted = states[:, 1:].double().mean(dim=1)
    assert torch.allclose(found[:, CONFIG.clip.width :].double(), wanted, atol=1e-6)


def test_answers_are_routes(watched: tuple[Any, Teller]) -> None:
    """A block's answers about the subjects that are there, without the stranger of the loss; they
    go to another grid as a router's do, and have no gradient."""
    unet, teller = watched
    torch.nn.init.normal_(teller.background)
    site = build_sites(CONFIG.unet)[4]
    g = torch.Generator().manual_seed(4)
    z = torch.randn(2, 16, site.channels, generator=g)
    routes = teller.routes(looks(), torch.tensor([[True, True], [True, False]]))
    assert routes.candidates == 3
    soft = routes.maps(site, z, (4, 4), ())
    assert not soft.maps.requires_grad

    double = teller.double()
    look, background = double.look(looks().double()), double.background.double()
    for row, there in enumerate((2, 1)):
        asked = torch.stack((*look[row, :there], background))
        scores = double.keys[4](asked) @ double.hidden[4](z[row].double()).T / 8
        wanted = scores.softmax(0)
        found = soft.maps[row, [*range(there), 2]]
        assert torch.allclose(found.double(), wanted, atol=1e-6)
    assert soft.maps[1, 1].max() == 0
    smaller = routes.resize(soft, (2, 2), ()).maps
    assert torch.allclose(smaller[0, 0, 0], soft.maps[0, 0].view(4, 4)[:2, :2].mean(), atol=1e-6)
