"""What people have in their folders and shards: read right, or refused by name."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageFilter

from anystory_core.data import parts, shards
from anystory_core.data.check import check
from anystory_core.data.index import Index
from anystory_core.data.schema import Raw, decode, draw_views
from anystory_core.errors import DataError


def read(folder: Path, files: Mapping[str, bytes], key: str = "a") -> Raw:
    """The one sample that these files make."""
    shards.write_folder([(key, files)], folder)
    (entry,) = Index.of((str(folder),))
    return decode(entry)


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pair() -> dict[str, bytes]:
    return dict(tiny.pairs(1)[0][1])


def scene() -> dict[str, bytes]:
    return dict(tiny.scenes(2)[1][1])


def test_masks_may_be_jpegs(tmp_path: Path) -> None:
    files = pair()
    mask = Image.open(io.BytesIO(files.pop("reference_mask.png")))
    files["reference_mask.jpg"] = files["target_mask.JPG"] = encoded(mask, "JPEG", quality=90)
    raw = read(tmp_path, files)
    assert raw.reference_mask is not None and len(raw.masks) == 1
    wanted = torch.from_numpy(np.array(mask)) > 127
    assert torch.equal(raw.reference_mask > 0.5, wanted) and torch.equal(raw.masks[0] > 0.5, wanted)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("ref_mask.png", "ref_mask.png is no part of a sample; perhaps reference_mask is meant"),
        ("referencemask.png", "perhaps reference_mask is meant"),
        ("target.bmp", "target is read from png, jpg, jpeg, webp files"),
        ("reference.jpg", "reference is there in two formats"),
    ],
)
def test_misspelt_parts_are_refused(tmp_path: Path, wrong: str, words: str) -> None:
    files = pair()
    files[wrong] = files["reference_mask.png"]
    with pytest.raises(DataError, match=words):
        read(tmp_path, files)
    report, good = check([str(tmp_path)])
    assert not good and words in report


def test_notes_of_other_tools_are_an_error_of_check_alone(tmp_path: Path) -> None:
    read(tmp_path, pair() | {"json": b"{}"})
    (tmp_path / "README.md").write_text("from where")
    report, good = check([str(tmp_path)])
    assert not good and "unknown part json: 1" in report and "corrupt: 0" in report
    assert "files of no sample: 1, such as README.md" in report


def test_soft_and_compressed_labels_are_refused(tmp_path: Path) -> None:
    files = scene()
    ys, xs = np.mgrid[:64, :64]
    half = (((ys - 30) ** 2 + (xs - 30) ** 2 < 400) * 255).astype(np.uint8)
    blurred = Image.fromarray(half).filter(ImageFilter.GaussianBlur(3))
    values = len(np.unique(np.asarray(blurred))) - 1
    assert values > 10
    with pytest.raises(DataError, match=f"{values} different values .* a soft edge"):
        read(tmp_path / "soft", files | {"masks.png": encoded(blurred, "PNG")})
    jpeg = encoded(Image.fromarray(half), "JPEG", quality=30)
    again = encoded(Image.open(io.BytesIO(jpeg)), "PNG")
    with pytest.raises(DataError, match="a soft edge"):
        read(tmp_path / "again", files | {"masks.png": again})
    del files["masks.png"]
    with pytest.raises(DataError, match=r"masks\.jpg is a JPEG"):
        read(tmp_path / "jpeg", files | {"masks.jpg": jpeg})


def test_labels_in_colours_are_refused(tmp_path: Path) -> None:
    colours = np.zeros((64, 64, 3), np.uint8)
    colours[:32] = (255, 0, 0)
    colours[32:] = (76, 76, 76)  # as bright as the red
    with pytest.raises(DataError, match=r"masks\.png has colours \(RGB\)"):
        read(tmp_path / "rgb", scene() | {"masks.png": shards.png(colours)})
    grey = np.repeat((colours[..., :1] > 100).astype(np.uint8), 3, axis=2)
    assert len(read(tmp_path / "grey", scene() | {"masks.png": shards.png(grey)}).masks) == 1


def test_many_and_deep_labels(tmp_path: Path) -> None:
    """400 subjects of 3x3 pixels: 16 bits, none merged with another, none taken for an edge."""
    masks = np.zeros((400, 64, 64), np.bool_)
    for i in range(400):
        masks[i, 3 * (i // 20) : 3 * (i // 20) + 3, 3 * (i % 20) : 3 * (i % 20) + 3] = True
    image = np.zeros((64, 64, 3), np.uint8)
    raw = read(tmp_path, shards.scene_files(image=image, masks=masks, caption="many"))
    assert torch.equal(raw.masks.bool(), torch.from_numpy(masks))


def test_labels_that_cannot_be_written() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    small = np.zeros((32, 64), np.bool_)
    with pytest.raises(DataError, match=r"mask 1 is \(32, 64\), expected .* \(64, 64\)"):
        shards.scene_files(image=image, masks=[small], caption="")
    dot = np.zeros((64, 64), np.bool_)
    with pytest.raises(DataError, match="more than 65535"):
        shards.labels_png((dot for _ in range(70_000)), (64, 64))


def test_sixteen_bits_of_grey(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    files = pair() | {"target.png": shards.png(ramp), "reference_mask.png": shards.png(ramp)}
    raw = read(tmp_path, files)
    wanted = torch.from_numpy(ramp.astype(np.float32) / 65535)
    assert torch.equal(raw.target[..., 1], wanted)
    assert raw.reference_mask is not None and torch.equal(raw.reference_mask, wanted)


def test_keys_may_have_dots(tmp_path: Path) -> None:
    samples = [("IMG.2024.01", scene()), ("IMG.2024.02", scene()), ("IMG", scene())]
    shards.write_folder(samples, tmp_path / "loose")
    shards.write_shards(samples, tmp_path / "shards")
    for name in ("loose", "shards"):
        found = [entry.key for entry in Index.of((str(tmp_path / name),))]
        assert found == [f"{name}/{key}" for key in ("IMG", "IMG.2024.01", "IMG.2024.02")]
    assert parts.split_name("IMG.2024.image.png") == ("IMG.2024", "image.png")


def test_a_key_twice_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for content in (b"one", b"two"):
            entry = tarfile.TarInfo("dog.caption.txt")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(DataError, match=r"a\.tar has dog\.caption\.txt twice"):
        Index.of((str(tmp_path / "a.tar"),))
    with pytest.raises(DataError, match="dog: a key twice"):
        shards.write_shard(str(tmp_path / "b.tar"), [("dog", scene()), ("dog", scene())])
    assert not (tmp_path / "b.tar").exists()


def test_packed_and_nested_shards_are_named(tmp_path: Path) -> None:
    inner = tmp_path / "data" / "train"
    shards.write_shards([("a", scene())], inner)
    with pytest.raises(DataError, match=r"shard-000000\.tar lies in a subfolder .* /.*train"):
        Index.of((str(tmp_path / "data"),))
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "a.tar.gz").write_bytes(b"\x1f\x8b")
    for path in (packed, packed / "a.tar.gz"):
        with pytest.raises(DataError, match=r"a\.tar\.gz is compressed"):
            Index.of((str(path),))


def test_a_mask_of_zero_and_one_is_said_to_be_black(tmp_path: Path) -> None:
    dim = np.zeros((64, 64), np.uint8)
    dim[:32] = 1
    with pytest.raises(DataError, match=r"target_mask\.png has the values 0 and 1"):
        read(tmp_path, pair() | {"target_mask.png": shards.png(dim)})


def test_odd_pairs_and_captions_are_counted(tmp_path: Path) -> None:
    files = pair()
    plain = {name: content for name, content in files.items() if "mask" not in name}
    same = plain | {"target.png": files["reference.png"], "caption.txt": b"\xef\xbb\xbf a shape \n"}
    long = plain | {"caption.txt": b"a shape " * 60}
    empty = plain | {"caption.txt": b"\n"}
    shards.write_folder([("a", same), ("b", long), ("c", empty)], tmp_path)
    assert decode(Index.of((str(tmp_path),))[0]).caption == "a shape"
    report, good = check([str(tmp_path)])
    assert good and "the reference is the target: 1" in report and "empty captions: 1" in report
    assert "captions with a byte order mark (left away): 1" in report
    assert "122 at most; 1 over 77, which lose their end" in report
    utf16 = plain | {"caption.txt": "a shape".encode("utf-16")}
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path / "utf16", utf16)


def test_check_says_how_references_are_cut_out(tmp_path: Path) -> None:
    files = pair()
    loose = {name: content for name, content in files.items() if "mask" not in name}
    picture = np.array(Image.open(io.BytesIO(files["reference.png"])))
    alpha = np.concatenate((picture, np.full((64, 64, 1), 255, np.uint8)), axis=2)
    alpha[:10, :, 3] = 0
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    samples = [
        ("file", files),
        ("alpha", loose | {"reference.png": shards.png(alpha)}),
        ("plain", loose),
        ("whole", loose | {"reference.png": shards.png(noise)}),
        ("scene", scene()),
    ]
    shards.write_folder(samples, tmp_path)
    report, good = check([str(tmp_path)])
    assert good, report
    for words in ("a file: 3", "alpha: 1", "plain background: 1", "whole picture: 1"):
        assert words in report
    assert "shorter side: 64 at least" in report and "about square 5" in report
    black = files | {"reference_mask.png": shards.png(np.zeros((64, 64), np.uint8))}
    with pytest.raises(DataError, match=r"reference_mask\.png is empty; white marks the subject"):
        read(tmp_path / "black", black)


def test_check_on_all_cores(tmp_path: Path, data) -> None:
    """As a user calls it, with more samples than one process is given at a time."""
    shards.write_shards(tiny.scenes(150), tmp_path / "one", per_shard=50)
    shards.write_shards(tiny.pairs(10), tmp_path / "two")
    process = data.apart("check", tmp_path / "one", tmp_path / "two", "--workers", 2)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    report, _ = check([str(tmp_path / "one"), str(tmp_path / "two")])
    assert report in out and "samples per source:\n  one: 150\n  two: 10" in report
    assert "--workers" in data.apart("check", "--help").communicate(timeout=60)[0]


def group(count: int, captions: bool = False) -> dict[str, bytes]:
    files: dict[str, bytes] = {"caption.txt": b"a shape"}
    for i in range(count):
        _, one = tiny.pairs(count, seed=i)[i]
        files[f"view{i}.png"] = one["target.png"]
        if captions:
            files[f"view{i}_caption.txt"] = f"shape {i}".encode()
    return files


def test_a_group_gives_pairs_of_different_views(tmp_path: Path) -> None:
    shards.write_shards([("a", group(4, captions=True))], tmp_path)
    (entry,) = Index.of((str(tmp_path),))
    assert entry.kind == "group"
    drawn = {draw_views(entry, random.Random(i)) for i in range(200)}
    assert len(drawn) == 12 and all(one != other for one, other in drawn)
    raw = decode(entry, ("view2", "view1"))
    assert raw.caption == "shape 1" and raw.reference is not None
    assert torch.equal(raw.target, decode(entry, ("view0", "view1")).target)
    assert "group: 1" in check([str(tmp_path)])[0]


def test_a_group_of_copies_is_refused(tmp_path: Path) -> None:
    files = group(2)
    files["view1.png"] = files["view0.png"]
    with pytest.raises(DataError, match="the same picture as view"):
        read(tmp_path, files)
    files["view2.png"] = group(3)["view2.png"]
    shards.write_folder([("a", files)], tmp_path / "three")
    (entry,) = Index.of((str(tmp_path / "three"),))
    drawn = {draw_views(entry, random.Random(i)) for i in range(100)}
    assert drawn and all("view2" in views for views in drawn)
