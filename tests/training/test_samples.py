"""What a run draws from: sources and their shares, scenes in stage 1, held-out samples, shapes."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from anystory_core.data import shards
from anystory_core.data.index import DataError
from anystory_core.errors import ConfigError
from anystory_core.training.batches import Batch
from anystory_core.training.config import TrainingConfig
from anystory_core.training.dataset import SampleDataset
from anystory_core.training.losses import target_maps
from anystory_core.training.order import Order
from anystory_core.training.samples import Samples, draw_pools
from anystory_core.training.settings import (
    BaseSettings,
    DataSettings,
    RouterSettings,
    RunSettings,
    SourceSettings,
    SubjectSettings,
    ValidationSettings,
)
from anystory_core.training.shapes import bucket_shapes, into_buckets, nearest, sizes_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    shards.write_folder(tiny.pairs(6), folder / "pairs")
    shards.write_folder(tiny.scenes(4), folder / "scenes")
    return folder


def config(data: DataSettings, stage: str = "subject", **changes: Any) -> TrainingConfig:
    own: dict[str, Any] = {"run": RunSettings(folder="unused", steps=1)}
    if stage == "router":
        own["router"] = RouterSettings(subject_file="unused", drop_text=0.0)
    else:
        own["subject"] = SubjectSettings(drop_text=0.0)
    return TrainingConfig(base=BaseSettings(path="unused"), data=data, **{**own, **changes})


def pools_of(run: TrainingConfig) -> Any:
    return draw_pools(Samples.of([origin.path for origin in run.data.origins]), run)


def test_stage_1_leaves_scenes_out_unless_asked(data: Path) -> None:
    both = DataSettings(paths=(str(data / "pairs"), str(data / "scenes")))
    plain = pools_of(config(both))
    assert len(plain) == 6 and any("4 scenes are left out" in note for note in plain.notes)
    asked = pools_of(config(both, subject=SubjectSettings(scenes=0.25)))
    assert [len(p) for p in asked.positions] == [6, 4] and asked.shares == (0.75, 0.25)
    assert any("25% of the samples are scenes" in note for note in asked.notes)
    alone = DataSettings(paths=(str(data / "scenes"),))
    with pytest.raises(DataError, match=r"needs samples of kind pair.*subject\.scenes = 1"):
        pools_of(config(alone))
    assert len(pools_of(config(alone, subject=SubjectSettings(scenes=1.0)))) == 4
    assert len(pools_of(config(both, "router"))) == 4


def test_sources_have_shares_or_repeats(data: Path) -> None:
    names = [str(data / name) for name in ("pairs", "scenes")]
    shared = tuple(SourceSettings(path=p, share=s) for p, s in zip(names, (0.9, 0.1), strict=True))
    found = pools_of(config(DataSettings(sources=shared), subject=SubjectSettings(scenes=0.5)))
    # All pairs are the first's and all scenes the second's, so half of each, as asked.
    assert [len(p) for p in found.positions] == [6, 4] and found.shares == (0.5, 0.5)
    twice = (SourceSettings(path=names[0], share=0.9), SourceSettings(path=names[0], share=0.1))
    found = pools_of(config(DataSettings(sources=twice)))
    assert [len(p) for p in found.positions] == [6, 6]
    assert found.shares == pytest.approx((0.9, 0.1))
    repeated = (SourceSettings(path=names[0], repeats=3), SourceSettings(path=names[0]))
    (positions,) = pools_of(config(DataSettings(sources=repeated))).positions
    assert sorted(positions.tolist()) == sorted([*range(6)] * 3 + [*range(6, 12)])
    for wrong, words in (
        ({}, "give paths, or sources"),
        ({"paths": ("a",), "sources": shared}, "give paths, or sources"),
        ({"sources": (shared[0], SourceSettings(path="a"))}, "every source a share, or none"),
    ):
        with pytest.raises(ConfigError, match=words):
            DataSettings(**wrong)
    with pytest.raises(ConfigError, match="share and repeats"):
        SourceSettings(path="a", share=0.5, repeats=2)


def test_held_out_samples_are_never_drawn(tmp_path: Path) -> None:
    """One of fifty, and none where that would be fewer than eight."""
    files = tiny.pairs(1)[0][1]
    for count, held in ((399, 0), (450, 9), (2000, 32)):
        folder = tmp_path / str(count)
        shards.write_shards(((f"{i:05d}", files) for i in range(count)), folder)
        run = config(DataSettings(paths=(str(folder),)))
        pools = pools_of(run)
        assert len(pools.held_out) == held and len(pools) == count - held
        assert not set(pools.held_out.tolist()) & set(pools.positions[0].tolist())
        assert np.array_equal(pools_of(run).held_out, pools.held_out)
        off = dataclasses.replace(run, validation=ValidationSettings(every=0))
        assert not len(pools_of(off).held_out)


def test_shapes_of_sdxl() -> None:
    shapes = bucket_shapes(1024)
    assert {(1024, 1024), (1344, 768), (768, 1344), (832, 1216), (512, 2048)} <= set(shapes)
    for height, width in shapes:
        assert height % 64 == width % 64 == 0 and 0.9 * 1024**2 < height * width <= 1024**2
    assert shapes[nearest((1344, 768), shapes)] == (1344, 768)
    assert shapes[nearest((4000, 4000), shapes)] == (1024, 1024)


def person(width: int, height: int, exif: int | None = None) -> shards.Files:
    """A scene of one subject that fills all of a tall picture but its edge."""
    picture = np.zeros((height, width, 3), np.uint8)
    mask = np.zeros((height, width), bool)
    mask[2:-2, 2:-2] = True
    picture[mask] = (200, 60, 60)
    files = dict(shards.scene_files(image=picture, masks=[mask], caption="a person"))
    if exif is not None:
        turned, buffer = Image.fromarray(np.rot90(picture).copy()), io.BytesIO()
        tags = turned.getexif()
        tags[0x0112] = exif
        turned.save(buffer, "PNG", exif=tags)
        files["image.png"] = buffer.getvalue()
    return files


def test_buckets_keep_tall_people_whole(tmp_path: Path) -> None:
    """A 1:2 picture keeps all but rounding; masks, size conditioning and Eq. 4's targets follow."""
    tall = [(f"tall{i}", person(40, 160, 6 if i == 1 else None)) for i in range(4)]
    wide = [(f"wide{i}", person(90, 60)) for i in range(4)]
    shards.write_folder([*tall, *wide], tmp_path / "data")
    settings = DataSettings(
        paths=(str(tmp_path / "data"),), resolution=64, max_subjects=1, shapes="buckets"
    )
    run = config(settings, "router", run=RunSettings(folder="unused", steps=1, batch=2))
    samples = Samples.of(settings.paths)
    pools = draw_pools(samples, run)
    known = np.unique(np.concatenate(pools.positions))
    sizes = sizes_of(samples, known, tmp_path / "sizes.npz")
    assert sizes[:4].tolist() == [[160, 40]] * 4 and sizes[4:].tolist() == [[60, 90]] * 4
    assert np.array_equal(sizes_of(samples, known, tmp_path / "sizes.npz"), sizes)
    shaped = into_buckets(pools, known, sizes, 64, 2)
    assert sorted(shaped.shapes) == [(32, 96), (128, 32)] or (64, 64) in shaped.shapes
    order = Order(shaped.positions, shaped.shares, 0, unit=2)
    dataset = SampleDataset(samples, order, run, tiny.config(), shapes=shaped.shapes)
    seen: set[tuple[int, ...]] = set()
    for number in range(0, 8, 2):
        batch = Batch.join([dataset[number], dataset[number + 1]])
        height, width = batch.target.shape[-2:]
        seen.add((height, width))
        assert batch.masks.shape[-2:] == (height, width)
        assert batch.time_ids[0, 4:].tolist() == [height, width]
        if batch.keys[0].startswith("data/tall"):
            assert (height, width) == (128, 32) and batch.time_ids[0, :2].tolist() == [160, 40]
            assert float(batch.masks[0].mean()) > 0.8
        maps = target_maps(batch.masks, (height // 16, width // 16))
        assert maps.shape == (2, 2, (height // 16) * (width // 16))
        assert torch.equal(maps.sum(dim=1), torch.ones(2, maps.shape[-1]))
    assert (128, 32) in seen and len(seen) == 2
    few = into_buckets(pools, known, sizes, 64, 5)
    assert len(few.shapes) == 1  # no shape has five: all go where most are
