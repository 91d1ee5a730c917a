"""The index: kept beside shards, true of them, and small."""

from __future__ import annotations

import io
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import tiny
import webdataset

from anystory_core.data import scan, shards
from anystory_core.data.index import Index

PARTS = ("caption.txt", "reference.png", "target.jpg")


def write(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            for part in PARTS:
                entry = tarfile.TarInfo(f"{name}.{part}")
                entry.size = len(name)
                tar.addfile(entry, io.BytesIO(name.encode()))


def contents(index: Index) -> list[tuple[str, dict[str, bytes]]]:
    return [(e.key, {n: place.read() for n, place in e.files.items()}) for e in index]


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write(tmp_path / f"{number:02d}.tar", [f"s{number}/{i}" for i in range(5)])
    first = contents(Index.of((str(tmp_path),)))
    assert len(first) == 60 and all(set(files) == set(PARTS) for _, files in first)
    assert all(set(files.values()) == {key.split("/", 1)[1].encode()} for key, files in first)
    scanned: list[str] = []
    original = scan._scan_shard
    monkeypatch.setattr(scan, "_scan_shard", lambda s: scanned.append(Path(s).name) or original(s))
    assert contents(Index.of((str(tmp_path),))) == first and not scanned
    write(tmp_path / "03.tar", ["other/1", "other/2"])
    (tmp_path / "07.tar").unlink()
    changed = contents(Index.of((str(tmp_path),)))
    assert scanned == ["03.tar"]
    kept = [s for s in first if s[0].split("/")[1] not in ("s3", "s7")]
    assert [s for s in changed if "other" not in s[0]] == kept and len(changed) == 52
    assert contents(Index.of((str(tmp_path),))) == changed and scanned == ["03.tar"]


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    """They are its format: other tools find the same samples in them."""
    samples = tiny.scenes(4)
    shards.write_shards(samples, tmp_path, per_shard=2)
    pattern = str(tmp_path / "shard-{000000..000001}.tar")
    read = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [(one["__key__"], one["masks.png"]) for one in read] == [
        (key, files["masks.png"]) for key, files in samples
    ]


def test_an_index_that_is_no_index(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ["x", "y"])
    whole = contents(Index.of((str(tmp_path),)))
    file = tmp_path / scan.INDEX
    good = file.read_bytes()
    version = b'"version":"1"'
    newer = good.replace(version, b'"version":"9"')
    for damage in (b"", b"nothing", good[:100], good[:-4], newer):
        file.write_bytes(damage)
        assert contents(Index.of((str(tmp_path),))) == whole
        mended = file.read_bytes()
        assert len(mended) == len(good) and version in mended


def test_read_only_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.tar", ["x"])

    def refuse(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(scan, "_write_index", refuse)
    assert len(Index.of((str(tmp_path),))) == 1 and not (tmp_path / scan.INDEX).exists()


def test_folders_and_shards_together(tmp_path: Path) -> None:
    """Positions run through all that is given, in that order; kinds are found by position."""
    shards.write_shards(tiny.pairs(3), tmp_path / "pairs")
    shards.write_folder(tiny.scenes(2), tmp_path / "scenes")
    shutil.copy(tmp_path / "pairs" / "shard-000000.tar", tmp_path / "alone.tar")
    index = Index.of([str(tmp_path / n) for n in ("scenes", "pairs", "alone.tar")])
    assert [entry.kind for entry in index] == ["scene"] * 2 + ["pair"] * 6
    assert index.of_kinds(("scene",)).tolist() == [0, 1]
    assert index.of_kinds(("pair",)).tolist() == [2, 3, 4, 5, 6, 7]
    with pytest.raises(IndexError, match="sample 8 of 8"):
        index[8]


def test_a_kept_index_costs_no_memory(tmp_path: Path) -> None:
    """The paper's stage 1 has 6.5 million pairs, and every process of a run holds all of them: what
    a process has of its own is what does not grow with them."""
    count = 4000
    write(tmp_path / "a.tar", [f"set/pair{i:07d}" for i in range(count)])
    Index.of((str(tmp_path),))
    assert (tmp_path / scan.INDEX).stat().st_size < 80 * count
    tracemalloc.start()
    index = Index.of((str(tmp_path),))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000 and len(index) == count
