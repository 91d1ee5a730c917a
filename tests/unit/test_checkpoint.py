"""Weights files: strict, named errors, atomic writes, a thousand damaged files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import random
import re
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anystory_core.bases.sdxl.config import AnyStoryConfig, UNetConfig
from anystory_core.config import ClipVisionConfig, QFormerConfig
from anystory_core.errors import CheckpointError
from anystory_core.weights.checkpoint import load_model, read_header, save_model
from anystory_core.weights.merge import merge_files
from anystory_core.weights.model import PARTS, AnyStoryModel, build_model

CONFIG = AnyStoryConfig(
    name="test",
    unet=UNetConfig(
        model_channels=32, channel_mult=(1, 1), transformer_depth=(0, 1), middle_depth=1,
        num_res_blocks=1, head_dim=16, context_dim=8, adm_channels=8,
    ),
    clip=ClipVisionConfig(width=8, layers=1, heads=1, intermediate=8, image_size=28),
    subject_qformer=QFormerConfig(queries=2, width=8, layers=1, heads=1, head_dim=8, output_dim=8),
    routing_qformer=QFormerConfig(queries=1, width=8, layers=1, heads=1, head_dim=8, output_dim=8),
)  # fmt: skip


@pytest.fixture
def model() -> AnyStoryModel:
    torch.manual_seed(0)
    return build_model(CONFIG)


@pytest.fixture
def file(tmp_path: Path, model: AnyStoryModel) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, model, CONFIG, metadata={"note": "hello"})
    return path


def test_round_trip(file: Path, model: AnyStoryModel) -> None:
    loaded = load_model(file)
    assert loaded.parts == tuple(PARTS) == read_header(file).parts
    assert loaded.config == CONFIG and read_header(file).metadata["note"] == "hello"
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert loaded.fingerprint == read_header(file).fingerprint != ""
    assert not any(p.requires_grad for _, m in loaded.modules() for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_storage_types(tmp_path: Path, model: AnyStoryModel, dtype: torch.dtype) -> None:
    path = tmp_path / "small.safetensors"
    save_model(path, model, CONFIG, dtype=dtype)
    state = load_model(path).state_dict()
    assert {t.dtype for t in state.values()} == {dtype}
    wide = load_model(path, dtype=torch.float32).state_dict()
    assert all(torch.equal(wide[k], state[k].float()) for k in state)


def test_every_tensor_keeps_its_type(tmp_path: Path, model: AnyStoryModel) -> None:
    """8-bit matrices, fp16 norms and biases, a float32 router: none is rounded, none grows."""

    def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.startswith("routers."):
            return tensor
        return tensor.to(torch.float8_e4m3fn if tensor.ndim > 1 else torch.float16)

    path = tmp_path / "mixed.safetensors"
    tensors = {name: stored(name, tensor) for name, tensor in model.state_dict().items()}
    save_model(path, tensors, CONFIG)
    state = load_model(path).state_dict()
    assert {name: t.dtype for name, t in state.items()} == {k: t.dtype for k, t in tensors.items()}
    assert len({t.dtype for t in state.values()}) == 3
    assert all(torch.equal(state[name].float(), t.float()) for name, t in tensors.items())


@pytest.mark.parametrize("part", list(PARTS))
def test_any_part_alone(tmp_path: Path, part: str) -> None:
    path = tmp_path / "part.safetensors"
    save_model(path, build_model(CONFIG, [part]), CONFIG)
    assert load_model(path).parts == (part,)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a file's JSON header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def config_edit(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        config = json.loads(header["__metadata__"]["anystory.config"])
        config["unet"].update(values)
        header["__metadata__"]["anystory.config"] = json.dumps(config)

    return change


def rename(header: dict[str, Any]) -> None:
    header["routers.1.coarse_x.weight"] = header.pop("routers.1.coarse_r.weight")


def reshape(header: dict[str, Any]) -> None:
    entry = header["routers.1.coarse_r.weight"]
    entry["shape"] = entry["shape"][::-1] if entry["shape"][0] != entry["shape"][1] else [1, 2]


def integers(header: dict[str, Any]) -> None:
    header["routers.1.coarse_r.weight"]["dtype"] = "I32"


EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no config": (lambda h: h["__metadata__"].pop("anystory.config"), "not an AnyStory file"),
    "config not JSON": (
        lambda h: h["__metadata__"].update({"anystory.config": "{"}), "not JSON",
    ),
    "newer format": (lambda h: h["__metadata__"].update({"anystory.format": "2"}), "reads '1'"),
    "unknown key": (config_edit(colour=1), "unknown ['colour']"),
    "absurd depth": (config_edit(middle_depth=10**9), "middle_depth"),
    "other widths": (config_edit(context_dim=16), "expected the U-Net's context_dim"),
    "renamed tensor": (rename, "1 tensors missing ['routers.1.coarse_r.weight']"),
    "misshapen tensor": (reshape, "routers.1.coarse_r.weight has shape"),
    "integer tensor": (integers, "is I32"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_strictness(file: Path, name: str) -> None:
    change, words = EDITS[name]
    edit(file, change)
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        load_model(file)
    assert file.name in str(error.value)


def test_foreign_files(tmp_path: Path) -> None:
    foreign = tmp_path / "lora.safetensors"
    save_file({"lora_unet.weight": torch.zeros(2, 2)}, foreign)
    pickled = tmp_path / "model.bin"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    for path in (foreign, pickled, empty, tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            load_model(path)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda size: 4, "model.safetensors: not a safetensors file, or cut off (4 bytes)"),
        (lambda size: 100, "model.safetensors: not a safetensors file, or cut off (100 bytes)"),
        (lambda size: size // 2, "model.safetensors: cannot be read ("),
        (lambda size: size - 1, "model.safetensors: cannot be read ("),
    ],
    ids=["length cut", "header cut", "half", "last byte cut"],
)
def test_truncated(file: Path, part: Callable[[int], int], words: str) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: part(len(data))])
    with pytest.raises(CheckpointError, match=re.escape(words) + ".*get it again"):
        load_model(file)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stops what runs longer: a hang is a failure, not an endless test."""

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_thousand_mutations(file: Path) -> None:
    """Bytes changed, cut and repeated, most of them in the header: an error of ours or a file that
    loads, soon, never anything else."""
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    rng = random.Random(0)
    loaded = 0
    for round_ in range(1000):
        mutant = bytearray(data)
        end = len(mutant) if round_ % 5 == 0 else 8 + length
        for _ in range(rng.randint(1, 4)):
            where = rng.randrange(end)
            match rng.randrange(4):
                case 0:
                    mutant[where] = rng.randrange(256)
                case 1:
                    mutant[where] = rng.choice(b'0123456789"[]{},:-eE.')
                case 2:
                    del mutant[where : where + rng.randint(1, 9)]
                case _:
                    mutant[where:where] = mutant[where : where + rng.randint(1, 9)]
        file.write_bytes(mutant)
        try:
            with within(20):  # a load takes milliseconds
                load_model(file)
            loaded += 1
        except CheckpointError as error:
            assert str(error).startswith("model.safetensors: ")
    assert loaded < 900  # most mutations are seen


def test_writes_are_atomic(
    file: Path, model: AnyStoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def fail(tensors: Any, path: str, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written in .*No space"):
        save_model(file, model, CONFIG)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_merge(tmp_path: Path, model: AnyStoryModel) -> None:
    state = model.state_dict()
    late = ("routers.", "encoder.routing.")
    one, two, out = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "out"))
    save_model(one, {k: v for k, v in state.items() if not k.startswith(late)}, CONFIG)
    save_model(two, {k: v for k, v in state.items() if k.startswith(late)}, CONFIG)
    merge_files((one, two), out)
    merged = load_model(out).state_dict()
    assert all(torch.equal(merged[k], state[k]) for k in state)
    merge_files((one, two), out, dtype=torch.float16)
    halved = load_model(out).state_dict()
    assert all(torch.equal(halved[k], state[k].half()) for k in state)
    with pytest.raises(CheckpointError, match="also in one"):
        merge_files((one, one), out)
    # What the first file says of routers, which it does not hold, does not count.
    coarse = dataclasses.replace(CONFIG, router=dataclasses.replace(CONFIG.router, refine=False))
    plain = build_model(coarse, ("routing_encoder", "routers")).state_dict()
    save_model(two, plain, coarse)
    for order in ((one, two), (two, one)):
        merge_files(order, out)
        assert load_model(out).config == coarse
    other = dataclasses.replace(CONFIG, name="other")
    save_model(two, {k: v for k, v in state.items() if k.startswith(late)}, other)
    with pytest.raises(CheckpointError, match="configuration differs"):
        merge_files((one, two), out)
