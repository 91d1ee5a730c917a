"""The mini world: same seed same scene, exact visible masks, families, captions."""

from __future__ import annotations

import io
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from lab.world import emoji as emoji_module
from lab.world import samples
from lab.world.backgrounds import PLACES, draw_place
from lab.world.emoji import Emoji
from lab.world.render import SIZE, Scene, captions, pool_of, render_reference, render_scene

COLOURS = [(230, 30, 30), (30, 200, 40), (40, 60, 230), (240, 220, 20), (200, 40, 220)]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Emoji]:
    """Five plain discs, each a family of its own, as RGBA files."""
    folder = tmp_path_factory.mktemp("sprites")
    out = []
    for i, colour in enumerate(COLOURS):
        picture = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(picture).ellipse((20, 20, 236, 236), fill=(*colour, 255))
        file = folder / f"{i}.png"
        picture.save(file)
        out.append(Emoji(str(i), f"thing{i}", f"family{i}", file))
    return out


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_scene_is_a_function_of_its_seed(subjects: list[Emoji], count: int) -> None:
    pool = pool_of(subjects)
    first = render_scene(pool, 11, subjects=count)
    again = render_scene(pool, 11, subjects=count)
    other = render_scene(pool, 12, subjects=count)
    assert np.array_equal(first.picture, again.picture)
    assert first.caption == again.caption
    for a, b in zip(first.instances, again.instances, strict=True):
        assert np.array_equal(a.mask, b.mask)
    assert not np.array_equal(first.picture, other.picture)
    assert len(first.instances) == count
    assert first.picture.shape == (SIZE, SIZE, 3) and first.picture.dtype == np.uint8


def test_masks_are_the_visible_pixels(subjects: list[Emoji]) -> None:
    """A disc's hue survives any light, so each mask's pixels must have their own subject's hue and
    no pixel may belong to two subjects."""
    pool = pool_of(subjects)
    for seed in range(12):
        scene = render_scene(pool, seed, subjects=3)
        masks = np.stack([instance.mask for instance in scene.instances])
        assert masks.sum(axis=0).max() == 1
        for instance, mask in zip(scene.instances, masks, strict=True):
            assert mask.sum() > 120
            colour = np.array(COLOURS[int(instance.emoji.code)], float)
            inside = np.median(scene.picture[mask].astype(float), axis=0)
            # light scales brightness and contrast by at most 15 %: the direction stays
            cosine = inside @ colour / np.linalg.norm(inside) / np.linalg.norm(colour)
            assert cosine > 0.96


def test_reference_mask_matches_white_ground(subjects: list[Emoji]) -> None:
    for seed in range(6):
        picture, mask = render_reference(subjects[seed % 5], seed, plain=True)
        white = (picture > 235).all(axis=-1)  # resampling leaves traces of alpha further out
        assert not (white & mask).any()
        # soft edge pixels (alpha below one half) lie within two pixels of the mask
        near = np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
        assert not (~white & ~near).any()
        again, _ = render_reference(subjects[seed % 5], seed, plain=True)
        assert np.array_equal(picture, again)


@pytest.fixture(scope="module")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Emoji:
    """A pole with a pennant on its right: no turn or mirroring of it looks like another one."""
    picture = Image.new("RGBA", (256, 256))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((20, 10, 110, 246), fill=(200, 40, 40, 255))
    pen.polygon(((110, 10), (240, 70), (110, 130)), fill=(200, 40, 40, 255))
    file = tmp_path_factory.mktemp("flag") / "flag.png"
    picture.save(file)
    return Emoji("flag", "flag", "flag", file)


def _filled(mask: np.ndarray) -> np.ndarray:
    """A mask cut to its box and stretched to 64x64."""
    picture = Image.fromarray(mask)
    return np.asarray(picture.crop(picture.getbbox()).resize((64, 64)))


def test_training_references_stand_as_in_their_scene(flag: Emoji) -> None:
    """Overlap of the two silhouettes, each filling its square: turned by up to 6 degrees against
    each other they share most of it, mirrored ones do not."""
    for seed in range(12):
        scene = render_scene([[flag]], seed, subjects=1, spread=0.0)
        (instance,) = scene.instances
        _, mask = render_reference(flag, seed + 100, pose=instance.pose)
        own, other = _filled(instance.mask), _filled(mask)
        mirrored = _filled(other[:, ::-1])
        overlap = (own & other).sum() / (own | other).sum()
        assert overlap > 0.7 > (own & mirrored).sum() / (own | mirrored).sum()


def test_composed_scenes_have_their_subject_in_the_middle(subjects: list[Emoji]) -> None:
    """Without spread the middle of a disc lies at half of the width and 0.55 of the height, with it
    up to a quarter and 0.17 away."""
    offsets: dict[float, list[float]] = {0.0: [], 1.0: []}
    for spread, found in offsets.items():
        for seed in range(10):
            scene = render_scene(pool_of(subjects), seed, subjects=1, spread=spread)
            y, x = np.nonzero(scene.instances[0].mask)
            found.append(max(abs(x.mean() / SIZE - 0.5), abs(y.mean() / SIZE - 0.55)))
    assert max(offsets[0.0]) < 0.02 < 0.1 < max(offsets[1.0]) < 0.27


def test_how_many_are_shown_does_not_say_who(subjects: list[Emoji]) -> None:
    """Of 64 families the first five are alone in about 26 of 600 training scenes; in five where
    both are decided by the same numbers."""
    scenes = pytest.importorskip("lab.world.scenes")
    pool = [[Emoji(str(i), f"thing{i}", str(i), subjects[i % 5].file)] for i in range(64)]
    shown = [scenes.training_scene(pool, seed, 32).instances for seed in range(600)]
    alone = [int(one[0].emoji.code) for one in shown if len(one) == 1]
    assert 15 < sum(number < 5 for number in alone) < 40


def test_who_is_shown_says_nothing_about_the_sample(
    tmp_path: Path, subjects: list[Emoji], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 families the first 16 are a quarter of those that are alone in a scene, and half of
    their pairs are named; all and none where the same numbers decide."""
    many = [Emoji(str(i), f"thing{i}", str(i), subjects[i % 5].file) for i in range(64)]
    written: list[tuple[Scene, str]] = []

    def keep(scene: Scene, *rest: Any) -> dict[str, bytes]:
        written.append((scene, rest[-1]))
        return {}

    monkeypatch.setattr(samples, "SHARD", 600)
    monkeypatch.setattr(samples, "render_scene", partial(render_scene, size=32))
    monkeypatch.setattr(samples, "scene_files", keep)
    monkeypatch.setattr(samples, "pair_files", keep)
    samples.write_samples(many, tmp_path, "scenes", 0)
    alone = [scene.instances[0] for scene, _ in written if len(scene.instances) == 1]
    assert 100 < len(alone) < 200
    assert 0.15 < sum(int(one.emoji.code) < 16 for one in alone) / len(alone) < 0.35
    written.clear()
    samples.write_samples(many, tmp_path, "pairs", 0)
    named = [
        caption == scene.caption
        for scene, caption in written
        if int(scene.instances[0].emoji.code) < 16
    ]
    assert 0.4 < sum(named) / len(named) < 0.6


def test_scene_never_shows_one_family_twice(tmp_path: Path, subjects: list[Emoji]) -> None:
    doubled = subjects + [Emoji(f"{e.code}b", e.name, e.family, e.file) for e in subjects]
    pool = pool_of(doubled)
    for seed in range(40):
        scene = render_scene(pool, seed, subjects=3)
        families = [instance.emoji.family for instance in scene.instances]
        assert len(set(families)) == 3


def test_captions_name_what_is_there_and_where() -> None:
    rng = random.Random(5)
    for trial in range(400):
        place = rng.choice(list(PLACES))
        names = rng.sample(["red apple", "owl", "piano", "green car"], rng.randint(1, 3))
        xs = [rng.random() for _ in names]
        named, plain = captions(names, xs, place, random.Random(trial))
        assert place in named and place in plain
        for name in names:
            article = "an" if name == "owl" else "a"
            assert f"{article} {name}" in named
            assert name not in plain
        assert plain.count("an object") == len(names)
        if "to the left of" in named:
            left, right = named.split("to the left of")
            order = sorted(zip(xs, names, strict=True))
            assert order[0][1] in left and order[1][1] in right


def test_variants_share_a_family_and_held_out_families_stay_out() -> None:
    family = emoji_module._family
    assert family(["1f44b", "1f3fb"], "waving hand") == family(["1f44b"], "waving hand")
    assert family(["1f468", "200d", "1f52c"], "man scientist") == family(
        ["1f469", "1f3fd", "200d", "1f52c"], "woman scientist"
    )
    assert family(["1f98a"], "fox") != family(["1f43a"], "wolf")
    held = emoji_module.HELD_OUT_FILE.read_text().splitlines()
    assert len(held) == len(set(held)) == 200
    items = [Emoji(f"{f}{i}", "x", f, Path("x")) for f in (held[0], "free") for i in range(3)]
    training, held_out = emoji_module.split(items)
    assert {e.family for e in training} == {"free"}
    assert {e.family for e in held_out} == {held[0]}


@pytest.mark.parametrize("place", list(PLACES))
def test_places_vary_with_the_seed(place: str) -> None:
    first = np.asarray(draw_place(place, random.Random(1), 64))
    assert np.array_equal(first, np.asarray(draw_place(place, random.Random(1), 64)))
    assert not np.array_equal(first, np.asarray(draw_place(place, random.Random(2), 64)))


def test_samples_are_what_the_trainer_reads(
    tmp_path: Path, subjects: list[Emoji], monkeypatch: pytest.MonkeyPatch
) -> None:
    index_module = pytest.importorskip("anystory_core.data.index")
    monkeypatch.setattr(samples, "SHARD", 3)
    for kind, expected in (("pairs", "pair"), ("scenes", "scene")):
        samples.write_samples(subjects, tmp_path / kind, kind, 0)
        index = index_module.Index.of((str(tmp_path / kind),))
        assert [entry.kind for entry in index] == [expected] * 3
    files = samples.scene_files(render_scene(pool_of(subjects), 3, subjects=2), "two")
    regions = np.asarray(Image.open(io.BytesIO(files["masks.png"])))
    assert set(np.unique(regions).tolist()) == {0, 1, 2}
    pair = samples.pair_files(render_scene(pool_of(subjects), 3, subjects=1), 9, "one")
    reference = np.asarray(Image.open(io.BytesIO(pair["reference.png"])))
    assert reference.shape == (SIZE, SIZE, 4) and set(np.unique(reference[..., 3])) == {0, 255}
    place = np.asarray(Image.open(io.BytesIO(pair["target_mask.png"])))
    assert place.shape == (SIZE, SIZE) and set(np.unique(place)) == {0, 255}


@pytest.mark.parametrize(("side", "reference"), [(SIZE, 192), (160, 128)])
def test_a_shard_holds_a_reference_of_each_subject(
    subjects: list[Emoji], side: int, reference: int
) -> None:
    """Regions are the visible parts of distinct subjects, on the latent's grid; empty behind the
    last."""
    scenes = pytest.importorskip("lab.world.scenes")
    scene = render_scene(pool_of(subjects), 3, subjects=2, size=side)
    cutouts, regions = scenes.cut_references(scene, 7)
    assert cutouts.shape == (3, reference, reference, 3) and regions.shape[0] == 3
    assert not cutouts[2].any() and not regions[2].any()
    shares = [i.mask.reshape(side // 8, 8, side // 8, 8).mean(axis=(1, 3)) for i in scene.instances]
    errors = [[np.abs(regions[k] / 255 - s).max() for s in shares] for k in (0, 1)]
    found = [int(np.argmin(row)) for row in errors]
    assert sorted(found) == [0, 1]  # each of them once
    assert all(errors[k][found[k]] < 0.51 / 255 for k in (0, 1))
    ground = np.abs(cutouts[:2].astype(int) - 128).max(axis=-1) > 8
    assert all(0.1 < share < 1 for share in ground.mean(axis=(1, 2)))
