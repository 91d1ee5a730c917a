"""References at the noise of the step: what is read of the U-Net, and what Eq. 6 makes of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from calls import HALVING, SITES, World
from torch import Tensor

from anystory_core.config import REFERENCES
from anystory_core.errors import RoutingError
from anystory_core.injection.keys import Candidates
from anystory_core.injection.matched import (
    MatchedReferences,
    Picture,
    ReferenceInputs,
    ReferencePass,
    ReferencesRead,
    noise_of,
    pictures_of,
    places_inside,
)
from anystory_core.injection.prepare import PreparedSubjects, Settings, prepare_subjects
from anystory_core.injection.rows import Rows
from anystory_core.mini.config import CONFIG
from anystory_core.routing.sources import SingleRoute
from anystory_core.subject.encoder import PictureStates, encode_subject
from anystory_core.subject.preprocess import prepare_views
from anystory_core.subject.subject import Subject
from anystory_core.weights.model import AnyStoryModel, build_model

SIDE = 8  # of a toy picture's latent
TEXT, POOLED = 7, 5


def pictures(owners: tuple[int, ...], *, masked: bool, text: bool = True) -> tuple[Picture, ...]:
    """Random toy pictures of these subjects; a mask of rows 1 ... n of the latent."""
    make = torch.Generator().manual_seed(len(owners))
    found: list[Picture] = []
    for number, owner in enumerate(owners):
        inside = torch.zeros(SIDE, SIDE)
        inside[1 : 4 + number, :] = 1
        found.append(
            Picture(
                owner,
                torch.randn(4, SIDE, SIDE, generator=make),
                torch.randn(3 * (1 + number % 2), TEXT, generator=make) if text else None,
                torch.randn(POOLED, generator=make) if text else None,
                inside if masked else None,
            )
        )
    return tuple(found)


class ToyUNet:
    """Random maps of a picture's tokens to keys and values at each block, as a U-Net's hidden
    states are functions of its noised latent; they read the first text token, too."""

    def __init__(self, grids: dict[int, tuple[int, int]], sigma: float) -> None:
        make = torch.Generator().manual_seed(5)
        self.grids, self.sigma = grids, sigma
        self.calls: list[int] = []
        self.maps = {
            site.index: [
                torch.randn(site.channels, 4, generator=make, dtype=torch.float64) for _ in range(2)
            ]
            for site in SITES
        }

    def tokens(self, latent: Tensor, grid: tuple[int, int]) -> Tensor:
        """(4,h,w) -> (Q,4): the latent's own places, taken in steps."""
        down, across = latent.shape[-2] // grid[0], latent.shape[-1] // grid[1]
        return latent[:, ::down, ::across].flatten(1).t()

    def forward(self, given: ReferenceInputs, reading: ReferencePass) -> None:
        self.calls.append(len(given.latents))
        noisy = given.latents.double() + self.sigma * given.noise.double()
        noisy = noisy + given.text[:, :1, :1, None].double()
        for site in SITES:
            grid = self.grids[site.stride]
            rows = torch.stack([self.tokens(x, grid) for x in noisy])
            k, v = (rows @ w.t() for w in self.maps[site.index])
            assert reading.self_attention(site.index, k, k, v, grid) is None
            reading.begin_cross_attention(site.index, rows, grid)
            assert reading.cross_attention(site.index, k, v) is v
        raise AssertionError("the pass went on after its last block")


GRIDS = {2: (8, 8), 4: (4, 4)}


def kept_by_hand(mask: Tensor, side: int) -> list[int]:
    """Places of a side x side grid that are at least half inside a mask; else the fullest."""
    step = mask.shape[0] // side
    shares = [
        float(mask[y * step : (y + 1) * step, x * step : (x + 1) * step].mean())
        for y in range(side)
        for x in range(side)
    ]
    best = max(shares)
    return [p for p, share in enumerate(shares) if share >= 0.5] or [
        p for p, share in enumerate(shares) if share == best
    ]


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("owners", [(0,), (0, 0), (0, 0, 1), (1, 2, 2, 3)])
def test_equation_6_over_what_was_read(
    owners: tuple[int, ...], masked: bool, at_once: int, way: str
) -> None:
    """Against the float64 transcription: x = z + sigma n, its tokens inside the mask, pictures of a
    subject side by side, one softmax with the block's own keys. Unconditional rows are the plain
    attention, bit for bit where rows are as long as SDXL's."""
    sigma, count = 2.5, 4
    world = World(count, rows=2, seed=3)
    toy = ToyUNet(GRIDS, sigma)
    given = pictures(owners, masked=masked)
    matched = MatchedReferences(given, SITES, count, TEXT, POOLED)
    found = matched.read(sigma, toy.forward, at_once=at_once)
    assert toy.calls == [min(at_once, len(owners) - i) for i in range(0, len(owners), at_once)]
    assert sorted(found) == [site.index for site in SITES[1:]]
    run = world.run().with_references(found)
    got = world.forward(world.call(run, Rows((0,), (1,))))

    by_hand: dict[int, list[Any]] = {}
    for site in SITES[1:]:
        keys: list[Any] = []
        for subject in range(count):
            k: list[Tensor] = []
            v: list[Tensor] = []
            for number, picture in enumerate(given):
                if picture.owner != subject:
                    continue
                assert picture.text is not None
                x = (
                    picture.latent.double()
                    + sigma * noise_of(number, sigma, picture.latent).double()
                )
                tokens = toy.tokens(x + picture.text[0, 0].double(), GRIDS[site.stride])
                side = GRIDS[site.stride][0]
                places = (
                    range(side * side)
                    if picture.inside is None
                    else kept_by_hand(picture.inside, side)
                )
                for place in places:
                    k.append(toy.maps[site.index][0] @ tokens[place])
                    v.append(toy.maps[site.index][1] @ tokens[place])
            keys.append((torch.stack(k), torch.stack(v)) if k else None)
        by_hand[site.index] = [*keys, None]
    before: Tensor | None = None
    for site in SITES:
        q, k, v, z, *_ = (x[0] for x in world.hidden[site.index])
        grid = HALVING[site.stride]
        if before is not None:
            maps, old = before
            route = (maps if old == grid else naive.resize(maps, old, grid)).argmax(dim=0)
            wanted = naive.equation_6(q, k, v, route, by_hand[site.index], world.gamma, site.heads)
            assert torch.allclose(got[site.index][0][0], wanted, atol=1e-9)
        plain = [x[1:] for x in world.hidden[site.index][:3]]
        uncond, without = got[site.index][0][1:], naive.dense_attention(*plain, site.heads)
        assert torch.allclose(uncond, without, rtol=0, atol=1e-14)
        assert torch.equal(uncond, without) or way == "masked"
        weights = dict(world.routers.at(site.index).state_dict())
        before = naive.router(weights, world.routing[0], z, 2)[1].float().double(), grid


def test_noise_is_new_for_each_level_and_picture_and_the_same_in_every_run() -> None:
    like = torch.zeros(4, 64, 64)
    one = noise_of(0, 3.0, like)
    assert torch.equal(one, noise_of(0, 3.0, like))
    others = [noise_of(1, 3.0, like), noise_of(0, 3.000001, like), noise_of(0, 2.0, like)]
    for x in (one, *others):
        assert abs(float(x.mean())) < 0.04 and abs(float(x.std()) - 1) < 0.03
    for x in others:
        assert abs(float((one * x).mean())) < 0.04  # 5 deviations


def test_texts_of_several_lengths_and_none() -> None:
    """Tokens are repeated to one length, which attention to them does not notice; without a text
    there are zeros."""
    given = (*pictures((0, 1), masked=False), *pictures((2,), masked=False, text=False))
    matched = MatchedReferences(given, SITES, 3, TEXT, POOLED)
    seen: list[ReferenceInputs] = []

    def forward(inputs: ReferenceInputs, reading: ReferencePass) -> None:
        seen.append(inputs)
        ToyUNet(GRIDS, 1.0).forward(inputs, reading)

    matched.read(1.0, forward, at_once=3)
    (inputs,) = seen
    texts = [picture.text for picture in given]
    assert texts[0] is not None and texts[1] is not None
    assert inputs.text.shape == (3, 6, TEXT)
    assert torch.equal(inputs.text[0], torch.cat((texts[0], texts[0])))
    assert torch.equal(inputs.text[1], texts[1])
    assert not inputs.text[2].any() and not inputs.pooled[2].any()
    matched = MatchedReferences(given[2:], SITES, 3, TEXT, POOLED)
    matched.read(1.0, forward, at_once=3)
    assert seen[1].text.shape == (1, 77, TEXT)


def test_a_pass_ends_at_the_last_block() -> None:
    reading = ReferencePass(pictures((0,), masked=False), last=3)
    x = torch.zeros(1, 4, 8)
    assert reading.self_attention(1, x, x, x, (2, 2)) is None and not reading.found
    assert reading.self_attention(2, x, x, x, (2, 2)) is None
    with pytest.raises(ReferencesRead):
        reading.self_attention(3, x, x, x, (2, 2))
    assert sorted(reading.found) == [2, 3]


def test_blocks_that_do_not_show_their_keys_are_named() -> None:
    matched = MatchedReferences(pictures((0,), masked=False), SITES, 1, TEXT, POOLED)
    with pytest.raises(
        RoutingError, match=r"matched noise': .* of .* block 2 first .* choose other"
    ):
        matched.read(1.0, lambda given, reading: None, at_once=1)
    last = SITES[-1].index

    def some(given: ReferenceInputs, reading: ReferencePass) -> None:
        x = torch.zeros(1, 4, 8)
        for index in range(1, last - 1):
            reading.self_attention(index, x, x, x, (2, 2))

    with pytest.raises(RoutingError, match=rf" 2 of {last - 1} blocks .* block {last - 1} first"):
        matched.read(1.0, some, at_once=1)


def test_blocks_that_are_not_read_keep_their_references() -> None:
    run = World(2, rows=1, seed=3).run()
    new = Candidates([None, None, None])
    given = run.with_references({2: new})
    assert given.conditions[1].reference is new
    for index in range(len(SITES)):
        assert index == 1 or given.conditions[index] == run.conditions[index]
    assert given.conditions[2].reference is run.conditions[2].reference


@pytest.fixture(scope="module")
def model() -> AnyStoryModel:
    torch.manual_seed(0)
    return build_model(CONFIG, ("subject_encoder", "clip_projections"))


@pytest.fixture(scope="module")
def subject(model: AnyStoryModel) -> Subject:
    """Two pictures; no ReferenceNet takes part."""
    grid = CONFIG.reference.size // CONFIG.reference.latent_stride
    make = torch.Generator().manual_seed(1)
    masks = torch.zeros(2, 40, 40)
    masks[:, 4:30, 4:20] = 1
    views = prepare_views(torch.rand(2, 40, 40, 3, generator=make), masks, CONFIG)
    tokens, width = CONFIG.clip.tokens, CONFIG.clip.width
    states = PictureStates(
        clip=torch.randn(2, tokens, width, generator=make),
        background=torch.randn(1, tokens, width, generator=make),
        latents=torch.randn(2, 4, grid, grid, generator=make),
        label=torch.randn(1, 77, CONFIG.unet.context_dim, generator=make),
        pooled=torch.randn(CONFIG.unet.pooled_dim, generator=make),
    )
    return encode_subject(model, views, states, label="fox")


Prepare = Callable[..., PreparedSubjects]


@pytest.fixture
def prepared(model: AnyStoryModel, subject: Subject) -> Prepare:
    def of(*, given: Subject = subject, **settings: Any) -> PreparedSubjects:
        return prepare_subjects(model, [given], SingleRoute(), Settings(**settings))

    return of


@pytest.mark.parametrize("which", REFERENCES)
def test_what_a_run_reads(
    prepared: Prepare, model: AnyStoryModel, subject: Subject, which: Any
) -> None:
    """Pictures with their label's text, masks where asked for; nothing for the other kinds, and
    nothing is projected for these."""
    run = prepared(references=which, matched_start=0.1, matched_end=0.8)
    assert all(c.reference[0] is None for c in run.conditions)  # no ReferenceNet in the file
    if "matched" not in which:
        assert run.matched is None
        return
    assert run.matched is not None
    assert (run.matched.start, run.matched.end) == (0.1, 0.8)
    assert [p.owner for p in run.matched.pictures] == [0, 0]
    assert (run.matched.sites, run.matched.subjects) == (model.sites, 1)
    assert run.matched.text_width == CONFIG.unet.context_dim
    assert run.matched.pooled_width == CONFIG.unet.pooled_dim
    for view, picture in enumerate(run.matched.pictures):
        assert subject.latents is not None and subject.inside is not None
        assert torch.equal(picture.latent, subject.latents[view])
        assert picture.text is not None and picture.text.shape == (77, CONFIG.unet.context_dim)
        assert picture.pooled is not None and picture.pooled.shape == (CONFIG.unet.pooled_dim,)
        if which.startswith("masked"):
            assert picture.inside is not None and torch.equal(picture.inside, subject.inside[view])
        else:
            assert picture.inside is None


def test_nothing_is_read_for_references_that_are_off(prepared: Prepare) -> None:
    assert prepared(references="matched noise", reference_strength=0.0).matched is None


@pytest.mark.parametrize("lost", [("latents", "inside"), ("latents",), ("inside",)])
def test_older_subjects_are_named(
    lost: tuple[str, ...], prepared: Prepare, subject: Subject
) -> None:
    old = dataclasses.replace(subject, **dict.fromkeys(lost))
    with pytest.raises(RoutingError, match=r"subject 1 \('fox'\) .* encode it again"):
        prepared(given=old, references="masked, matched noise")
    # One that does not act is not asked, and does not end the list.
    assert pictures_of([old], [False], masked=True) == ()
    there = pictures_of([old, subject], [False, True], masked=True)
    assert [picture.owner for picture in there] == [1, 1]


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (-0.1, 1.0, "matched_start: got -0.1"),
        (0.0, 1.5, "matched_end: got 1.5"),
        (0.6, 0.5, "matched_start: got 0.6, after matched_end = 0.5"),
        (math.nan, 1.0, "matched_start: got nan"),
    ],
)
def test_windows_that_are_none(start: float, end: float, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        Settings(matched_start=start, matched_end=end)


def test_an_empty_mask_keeps_its_fullest_place() -> None:
    inside = torch.zeros(2, 8, 8)
    inside[0, 5, 6] = 0.2
    inside[1, :4] = 1
    places = places_inside(inside, (4, 4)).tolist()
    assert places == [2 * 4 + 3, *(16 + p for p in range(8))]
