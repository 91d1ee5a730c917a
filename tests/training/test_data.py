"""Samples in folders and shards: what is read, and what is corrupt."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from anystory_core.data import shards
from anystory_core.data.check import check
from anystory_core.data.index import Index
from anystory_core.data.schema import decode
from anystory_core.errors import DataError
from anystory_core.training.batches import Batch
from anystory_core.training.config import load_config
from anystory_core.training.corrupt import CorruptSamples
from anystory_core.training.loop import Trainer


def test_data_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor"):
        Index.of((str(tmp_path / "no"),))
    with pytest.raises(DataError, match="holds no samples"):
        Index.of((str(tmp_path),))
    (tmp_path / "shard.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match="cannot be read"):
        Index.of((str(tmp_path),))


def test_an_empty_shard(tmp_path: Path) -> None:
    shards.write_shards([], tmp_path)
    (tmp_path / "shard-000000.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(DataError, match="holds no samples"):
        Index.of((str(tmp_path),))


def test_shards_and_folders_hold_the_same(tmp_path: Path) -> None:
    samples = tiny.pairs(3) + tiny.scenes(3)
    shards.write_shards(samples, tmp_path / "shards", per_shard=2)
    shards.write_folder(samples, tmp_path / "folder")
    packed, loose = (Index.of((str(tmp_path / n),)) for n in ("shards", "folder"))
    assert len(packed) == len(loose) == 6
    for a, b in zip(packed, loose, strict=True):
        assert a.kind == b.kind
        one, two = decode(a), decode(b)
        assert one.caption == two.caption and bool((one.target == two.target).all())
        assert one.masks.shape == two.masks.shape and bool((one.masks == two.masks).all())


def test_the_checker_names_bad_samples(tmp_path: Path) -> None:
    shards.write_folder(tiny.pairs(3) + tiny.scenes(2), tmp_path)
    assert check([str(tmp_path)])[1]
    (tmp_path / "pair0001.target.png").write_bytes(b"no picture")
    (tmp_path / "scene0000.caption.txt").unlink()
    report, good = check([str(tmp_path)])
    assert not good and "corrupt: 2" in report and "pair: 2" in report and "64x64: 3" in report
    assert "pair0001: target.png is not a picture" in report and "scene0000: has" in report


def test_the_checker_cuts_references_out(tmp_path: Path) -> None:
    """What decodes may still hold nothing to train on, and a run would call it corrupt."""
    samples = tiny.pairs(3)
    empty = shards.png(np.zeros((64, 64), np.uint8))
    samples[1][1]["reference_mask.png"] = empty
    samples += tiny.scenes(1)
    nobody = tiny.scenes(1)[0][1] | {"masks.png": empty}
    shards.write_folder([*samples, ("nobody", nobody)], tmp_path)
    report, good = check([str(tmp_path)])
    assert not good and "corrupt: 1" in report and "pair0001: " in report and "empty" in report
    assert "  0: 1" in report and "stage 'subject' counts them as corrupt" in report


def test_an_index_is_small_when_first_made(tmp_path: Path) -> None:
    """The paper's stage 1 has 6.5 million pairs, and every process of a run holds all of them."""
    count = 2000
    names = [f"set/pair{i:07d}" for i in range(count)]
    parts = ("caption.txt", "reference.png", "target.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            for part in parts:
                entry = tarfile.TarInfo(f"{name}.{part}")
                entry.size = len(name)
                tar.addfile(entry, io.BytesIO(name.encode()))
    Index.of((str(tmp_path),))  # what is loaded once does not count
    tracemalloc.start()
    index = Index.of((str(tmp_path),))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 150 * count  # 87 bytes a sample, and arrays that grow ahead
    for place in (0, 1234, count - 1):
        entry = index[place]
        assert entry.key == f"{tmp_path.name}/{names[place]}" and set(entry.files) == set(parts)
        assert {file.read() for file in entry.files.values()} == {names[place].encode()}


def test_transparent_targets_lie_on_white(tmp_path: Path) -> None:
    """A rendering's alpha is also where the subject is; what lies under it is any colour."""
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[16:48, 16:48] = (255, 0, 0, 255)
    picture[16, 16, 3] = 51  # a fifth
    files = dict(tiny.pairs(1)[0][1])
    files["target.png"] = shards.png(picture)
    scene = dict(tiny.scenes(1)[0][1])
    scene["image.png"] = shards.png(picture)
    shards.write_folder([("a", files), ("b", scene)], tmp_path)
    pair, other = (decode(entry) for entry in Index.of((str(tmp_path),)))
    for raw in (pair, other):
        assert raw.target[0, 0].tolist() == [1, 1, 1] and raw.target[32, 32].tolist() == [1, 0, 0]
        assert raw.target[16, 16].tolist() == pytest.approx([1, 0.8, 0.8])
    assert torch.equal(pair.masks[0], torch.from_numpy(picture[..., 3]).float() / 255)


def test_samples_say_what_was_enlarged_and_cut_off(world: Any, tmp_path: Path) -> None:
    """SDXL's size conditioning: a small wide picture is not learned as a whole large one."""
    files = {
        name: data for name, data in tiny.pairs(1)[0][1].items() if not name.startswith("target")
    }
    files["target.png"] = shards.png(np.zeros((32, 48, 3), np.uint8))
    shards.write_folder([("small", files), ("whole", tiny.pairs(1)[0][1])], tmp_path / "data")
    path = tiny.run_toml(tmp_path / "run", world.base, tmp_path / "data", "subject", steps=1)
    trainer = Trainer(load_config(path))
    batch = Batch.join([trainer.dataset[i] for i in range(2)])
    rows = dict(zip(batch.keys, batch.time_ids.tolist(), strict=True))
    assert rows == {"data/small": [32, 48, 0, 16, 64, 64], "data/whole": [64, 64, 0, 0, 64, 64]}
    assert torch.equal(trainer.noised(batch).inputs.time_ids, batch.time_ids)


def test_inside_needs_the_place_of_the_subject(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs with a mask of the target train; of one without, the run says what it needs, and of
    one whose mask has another size, which."""
    data = tmp_path / "data"
    whole = np.zeros((64, 64), np.bool_)
    whole[:32] = True
    masks = [shards.png(whole.astype(np.uint8) * 255)] * 6 + [
        shards.png(np.zeros((9, 9), np.uint8))
    ]
    samples = tiny.pairs(8)
    for (_, files), mask in zip(samples, masks, strict=False):
        files["target_mask.png"] = mask
    shards.write_folder(samples, data)
    path = tiny.run_toml(tmp_path / "run", world.base, data, "subject", steps=2)
    path.write_text(path.read_text().replace("[subject]", "[subject]\ninside = 3.0"))
    trainer = Trainer(load_config(path))
    assert trainer.stage.inside == 3.0
    batch = Batch.join([trainer.dataset[0]])
    assert batch.masks.shape[1] == 1 and 0.4 < float(batch.masks.mean()) < 0.6
    trainer.run()
    said = capsys.readouterr().err
    assert "pair0006: target_mask.png is (9, 9), the picture (64, 64)" in said
    assert "pair0007: no target_mask.png, which subject.inside = 3 needs" in said


def test_masks_in_palette_files(tmp_path: Path) -> None:
    """Black and white may be the numbers 0 and 1 of a palette; only masks.png means the numbers."""
    half = np.zeros((64, 64), np.uint8)
    half[:32] = 1
    image = Image.fromarray(half, "P")
    image.putpalette((0, 0, 0, 255, 255, 255))
    file = io.BytesIO()
    image.save(file, "PNG")
    samples = [*tiny.pairs(1), *tiny.scenes(1)]
    for (_, files), names in zip(
        samples, (("target_mask.png", "reference_mask.png"), ("masks.png",)), strict=True
    ):
        files.update(dict.fromkeys(names, file.getvalue()))
    shards.write_folder(samples, tmp_path)
    pair, scene = (decode(entry) for entry in Index.of((str(tmp_path),)))
    for mask in (pair.masks[0], pair.reference_mask, scene.masks[0]):
        assert mask is not None
        assert torch.equal(mask, torch.from_numpy(half).float())


def test_photographs_are_turned_as_the_host_turns_them(tmp_path: Path) -> None:
    """Phones save them lying, with a note which side is up."""
    ((_, files),) = tiny.pairs(1)
    lying = Image.new("RGB", (64, 32), "red")
    lying.paste("blue", (0, 0, 32, 32))
    note = Image.Exif()
    note[0x0112] = 6  # the right side is up
    file = io.BytesIO()
    lying.save(file, "JPEG", quality=95, exif=note)
    for name in [n for n in files if n.startswith(("target", "reference_mask"))]:
        del files[name]
    files["target.jpg"] = file.getvalue()
    shards.write_folder([("one", files)], tmp_path)
    target = decode(Index.of((str(tmp_path),))[0]).target
    assert target.shape == (64, 32, 3)
    assert target[:32, :, 2].mean() > 0.8 and target[32:, :, 0].mean() > 0.8  # blue is up


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("target.png", lambda path: path.write_bytes(b"no picture"), "target.png is not a picture"),
    ("caption.txt", Path.unlink, "has ['reference.png', 'reference_mask.png'"),
]


@pytest.mark.parametrize(("file", "damage", "words"), DAMAGES)
def test_corrupt_samples_are_replaced_counted_and_named(
    world: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[Path], object],
    words: str,
) -> None:
    data = tmp_path / "data"
    shards.write_folder(tiny.pairs(8), data)
    damage(data / f"pair0003.{file}")
    (data / "sources.txt").write_text("where they are from")  # no part of a sample
    path = tiny.run_toml(tmp_path / "run", world.base, data, "subject", steps=2)
    trainer = Trainer(load_config(path))
    trainer.run()
    said = capsys.readouterr().err
    assert said.count(f"replaced by the next: data/pair0003: {words}") == 1
    assert "1 of 8 samples were corrupt: ['data/pair0003']" in said


def test_too_many_corrupt_samples_stop_the_run() -> None:
    said: list[str] = []
    corrupt = CorruptSamples(1000, said.append)
    for _ in range(50):  # epochs: a sample counts once
        corrupt.note(f"sample{number}: torn" for number in range(10))
    with pytest.raises(DataError, match="11 of 1000 samples are corrupt.*sample0: torn"):
        corrupt.note(["sample10: torn"])
    assert len(said) == 11
    few = CorruptSamples(50, said.append)
    few.note(["one: torn", "two: torn"])
    with pytest.raises(DataError, match="3 of 50"):
        few.note(["three: torn"])
