"""The base reads references as stage 1 will: with the same numbers, and only where it may."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.injection.call import Call
from anystory_core.injection.keys import Candidates
from anystory_core.injection.prepare import PreparedSubjects, SiteConditions, project
from anystory_core.injection.rows import Rows
from anystory_core.mini.config import CONFIG
from anystory_core.routing.sources import RouteSource, SingleRoute
from anystory_core.training.hosts import unet as diffusers_unet
from anystory_core.training.hosts.unet import UNetInputs
from anystory_core.training.initial import ROUTER_PARTS, init_from_unet
from anystory_core.weights.model import PARTS, build_model
from lab.networks.base import build_unet, size_ids
from lab.networks.clip_branch import ClipBranch
from lab.networks.reading import Reader
from lab.networks.row_sources import RowSources

BATCH, SIDE = 2, 16


@pytest.fixture
def unet() -> Any:
    torch.manual_seed(0)
    return build_unet().eval().requires_grad_(False)


def inputs(batch: int = BATCH) -> UNetInputs:
    """Of the first ``batch`` of three rows."""
    g = torch.Generator().manual_seed(1)
    return UNetInputs(
        torch.randn(batch, 4, SIDE, SIDE, generator=g),
        torch.tensor([100, 700, 900])[:batch],
        torch.randn(batch, 77, CONFIG.unet.context_dim, generator=g),
        torch.randn(batch, CONFIG.unet.context_dim, generator=g),
        size_ids(batch),
    )


def references() -> Tensor:
    side = CONFIG.reference.size // 8
    return torch.randn(BATCH, 4, side, side, generator=torch.Generator().manual_seed(2))


def drawn(
    unet: Any,
    conditions: tuple[SiteConditions, ...],
    source: RouteSource,
    biases: tuple[float, ...],
) -> Tensor:
    """What the injection itself gives, without a reader; it takes the U-Net from that."""
    sites = build_sites(CONFIG.unet)
    run = PreparedSubjects(conditions, source, (1.0,) * len(biases), biases)
    active = (True,) * run.subjects
    call = Call(run, Rows(tuple(range(BATCH))), active, sites, diffusers_unet.dense_attention)
    return diffusers_unet.predict(unet, diffusers_unet.install(unet, sites), call, inputs())


def test_stage_1_begins_with_what_the_base_reads(unet: Any) -> None:
    """A ReferenceNet and K, V maps that begin from the U-Net, routed everywhere (Eq. 6, gamma 0),
    give the base's own reading, to float32 rounding."""
    reader = Reader(unet, CONFIG)
    there = torch.ones(BATCH, 1, dtype=torch.bool)
    everywhere = reader.call(references()[:, None], there, SingleRoute())
    read = diffusers_unet.predict(unet, reader.slot, everywhere, inputs())

    sites = build_sites(CONFIG.unet)
    model = build_model(CONFIG, ("reference_net", "reference_projections"))
    init_from_unet(model, unet.state_dict())
    assert model.reference_net is not None
    latents = torch.cat((references(), torch.rand(BATCH, 1, *references().shape[-2:])), dim=1)
    features = model.reference_net(latents)  # the mask's channel has no weight yet
    conditions = project(model.projections, sites, [None, None], [features, None])
    trained = drawn(unet, conditions, SingleRoute(), (0.0, -math.inf))
    assert (read - trained).abs().max() < 1e-5 * read.abs().max()


def test_tokens_enter_as_stage_1_has_them(unet: Any) -> None:
    """The CLIP branch and the references of two subjects, each in its place, given the same weights
    (Eq. 5 and 6); a subject that is not shown has the background's tokens."""
    torch.manual_seed(3)
    model = build_model(CONFIG, tuple(part for part in PARTS if part not in ROUTER_PARTS))
    init_from_unet(model, unet.state_dict())
    branch, reader = ClipBranch(CONFIG), Reader(unet, CONFIG)
    branch.copy_from(model)
    shape = CONFIG.clip.tokens, CONFIG.clip.width
    seen, zero = torch.randn(BATCH, 2, *shape), torch.randn(1, *shape)
    latents = torch.stack((references(), references().flip(0)), dim=1)  # (B,2,4,r,r)
    places = torch.zeros(BATCH, 2, SIDE, SIDE)
    places[:, 0, :8], places[:, 1, 8:] = 1, 1
    source = RowSources.of_masks(places)
    there, shown = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[True, True], [True, False]])
    clip = branch.candidates(seen, zero, shown)
    call = reader.call(latents, there, source, BATCH, clip)
    got = diffusers_unet.predict(unet, reader.slot, call, inputs())

    assert model.reference_net is not None and model.encoder.subject is not None
    mask = torch.ones_like(latents[:, 0, :1])  # its channel has no weight yet
    net, encode = model.reference_net, model.encoder.subject
    features = [net(torch.cat((latents[:, i], mask), dim=1)) for i in (0, 1)]
    tokens, background = [encode(seen[:, i]) for i in (0, 1)], encode(zero)
    tokens[1] = torch.cat((tokens[1][:1], background))
    conditions = project(model.projections, model.sites, [*tokens, background], [*features, None])
    wanted = drawn(unet, conditions, source, (0.0, 0.0, -math.inf))
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_tokens_alone_are_the_clip_branch_without_references(unet: Any) -> None:
    torch.manual_seed(3)
    branch, reader = ClipBranch(CONFIG), Reader(unet, CONFIG)
    seen = torch.randn(BATCH, 1, CONFIG.clip.tokens, CONFIG.clip.width)
    there = torch.ones(BATCH, 1, dtype=torch.bool)
    clip = branch.candidates(seen, torch.randn(1, *seen.shape[2:]), there)

    def read(latents: Tensor | None, tokens: list[Candidates]) -> Tensor:
        call = reader.call(latents, there, SingleRoute(), clip=tokens)
        return diffusers_unet.predict(unet, reader.slot, call, inputs())

    alone = read(None, clip)
    both = read(references()[:, None], clip)
    assert not torch.allclose(alone, both, atol=1e-3)
    plain = diffusers_unet.predict(unet, reader.slot, None, inputs())
    assert torch.allclose(read(None, []), plain, atol=1e-6)
    tokens, _ = branch.encoder(seen[:, 0])
    conditions = project(branch.projections, branch.sites, [tokens, None], [None, None])
    wanted = drawn(unet, conditions, SingleRoute(), (-math.inf, -math.inf))
    assert (alone - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_only_the_region_and_the_first_rows_read(unet: Any) -> None:
    reader = Reader(unet, CONFIG)
    plain = diffusers_unet.predict(unet, reader.slot, None, inputs(3))
    region = torch.zeros(BATCH, 1, SIDE, SIDE)
    region[1, 0, :8] = 1
    there = torch.ones(BATCH, 1, dtype=torch.bool)
    call = reader.call(references()[:, None], there, RowSources.of_masks(region))
    read = diffusers_unet.predict(unet, reader.slot, call, inputs(3))
    assert torch.allclose(read[0], plain[0], atol=1e-6)  # nothing of it may read
    assert not torch.allclose(read[1], plain[1], atol=1e-4)
    assert torch.allclose(read[2], plain[2], atol=1e-6)  # no reference at all

    maps = call.soft_maps[1]
    assert maps.grid == (8, 8) and maps.maps.shape == (BATCH, 2, 64)
    inside = (maps.maps.argmax(dim=1) == 0).view(BATCH, 8, 8)
    assert torch.equal(inside, region[:, 0, ::2, ::2] == 1)


def test_two_subjects_are_read_each_in_its_place(unet: Any) -> None:
    """A row with both is what it is alone with the same two; in a row that lacks one, what stands
    in its place does not matter."""
    reader = Reader(unet, CONFIG)
    both = torch.stack((references(), references().flip(0)), dim=1)  # (B,2,4,r,r)
    places = torch.zeros(BATCH, 2, SIDE, SIDE)
    places[0, 0, :8], places[0, 1, 8:], places[1, 0, :, :8] = 1, 1, 1
    there = torch.tensor([[True, True], [True, False]])
    source = RowSources.of_masks(places)

    def read(latents: Tensor, present: Tensor) -> Tensor:
        call = reader.call(latents, present, source)
        return diffusers_unet.predict(unet, reader.slot, call, inputs())

    together = read(both, there)
    swapped = read(both.flip(1), torch.ones_like(there))
    assert not torch.allclose(together[0], swapped[0], atol=1e-4)
    other = both.clone()
    other[1, 1] = 7
    assert torch.equal(read(other, there), together)

    # Given places are taken as they are; else a subject that is ahead everywhere gives some up.
    places[0], places[0, 1, :, :8] = 0.5, 0.4
    places[0, 0] = 0.6
    source = RowSources.of_masks(places)
    given, agreed = (
        diffusers_unet.predict(
            unet, reader.slot, reader.call(both, there, source, placed), inputs()
        )
        for placed in (1, 0)
    )
    assert not torch.allclose(given[0], agreed[0], atol=1e-4)
    assert torch.equal(given[1], agreed[1])

    one = RowSources.of_masks(places[1:, :1])
    call = reader.call(both[1:, :1], there[1:, :1], one)
    second = UNetInputs(*(x[1:] for x in vars(inputs()).values()))
    alone = diffusers_unet.predict(unet, reader.slot, call, second)
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_rows_can_have_different_sources() -> None:
    """Each source gets its own rows, in order, at a block and on another grid."""
    masks = torch.zeros(2, 1, SIDE, SIDE)
    masks[1, 0, :, :8] = 1
    source = RowSources((*RowSources.of_masks(masks).parts, (2, SingleRoute())))
    assert source.candidates == 2
    site = build_sites(CONFIG.unet)[0]
    for soft in (
        source.maps(site, torch.zeros(4, 64, 64), (8, 8), ()),
        source.resize(source.maps(site, torch.zeros(4, 64, 64), (8, 8), ()), (4, 4), ()),
    ):
        subject = soft.maps[:, 0].view(4, *soft.grid)
        half = soft.grid[1] // 2
        assert subject[0].sum() == 0 and subject[2:].min() == 1
        assert subject[1, :, :half].min() == 1 and subject[1, :, half:].max() == 0


def test_reading_trains_the_base_alone(unet: Any) -> None:
    """Gradients reach the U-Net's own weights through both passes; nothing else has any."""
    unet.requires_grad_(True)
    reader = Reader(unet, CONFIG)
    assert all(p.is_meta for p in reader.net.parameters())
    features = reader.features(references())
    features[-1].square().sum().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0
