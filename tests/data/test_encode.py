"""Encodings ahead of training: in shards, and found there by the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from anystory_core.data import shards
from anystory_core.training.cache import digest_of, pixels_name, text_name
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer
from anystory_core.training.packed import PackedEncodings


@pytest.fixture
def run_file(world: dict[str, Path], tmp_path: Path) -> Path:
    """A run on pairs and one group, all mirrored by chance."""
    views = {f"view{i}.png": files["target.png"] for i, (_, files) in enumerate(tiny.pairs(3))}
    samples = [*tiny.pairs(5, seed=9), ("group", {"caption.txt": b"three", **views})]
    shards.write_shards(samples, tmp_path / "samples")
    return tiny.run_toml(
        tmp_path / "run", world["base"], tmp_path / "samples", "subject", steps=6,
        data={"cache": str(tmp_path / "cache"), "mirror": True}, subject={"drop_text": 0.0},
    )  # fmt: skip


def test_training_reads_what_was_encoded(
    run_file: Path, tmp_path: Path, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = data("encode", run_file, "--batch", 3, "--per-shard", 4)
    # 5 targets and 3 views, each mirrored; "a shape" and "three", the first in both shards
    assert "19 samples" in said and "of 6 items" in said
    trainer = Trainer(load_config(run_file))
    assert trainer.encodings.folder is not None
    assert len(PackedEncodings(trainer.encodings.folder / "shards")) == 19
    before = sorted(tmp_path.glob("cache/*/??/*"))
    for name in ("text", "encode_picture"):
        original = getattr(trainer.frozen, name)
        monkeypatch.setattr(trainer.frozen, name, _only_references(original, name))
    trainer.run()
    assert not before and not sorted(tmp_path.glob("cache/*/??/*"))  # no file of its own


def _only_references(original: Any, name: str) -> Any:
    """The run may still encode its augmented references, which are new every time."""
    seen: list[int] = []

    def asked(inputs: Any) -> Any:
        seen.append(len(inputs))
        assert name == "encode_picture", "a caption was encoded again"
        return original(inputs)

    return asked


def test_encodings_are_what_the_run_would_make(run_file: Path, data: Any) -> None:
    trainer = Trainer(load_config(run_file))
    data("encode", run_file)
    packed = PackedEncodings(trainer.encodings.folder / "shards")
    sample = trainer.dataset[0]
    latents = packed.read(digest_of(pixels_name("latents", sample.target[0])))
    assert latents is not None
    wanted = trainer.frozen.encode_picture(sample.target)[0]
    assert float((latents["latents"] - wanted).abs().max()) < 1e-5  # of about 1; other batches
    states = packed.read(digest_of(text_name(sample.captions[0])))
    assert states is not None
    assert (
        float((states["states"] - trainer.frozen.text(list(sample.captions))[0][0]).abs().max())
        < 1e-5
    )
    assert packed.read(digest_of(text_name("never seen"))) is None


def test_encode_needs_a_folder(run_file: Path, data: Any) -> None:
    text = run_file.read_text()
    run_file.write_text("\n".join(line for line in text.splitlines() if "cache" not in line))
    code, _, error = data.ended("encode", run_file)
    assert code == 1 and "data.cache is not set" in error
