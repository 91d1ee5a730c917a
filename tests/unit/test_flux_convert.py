"""The authors' file for FLUX -> ours: every tensor, every variant of the file, every refusal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux_release
import pytest
import torch
from flux_scene import CONFIG
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anystory_core.bases.flux.config import FluxConfig, ReduxConfig, SiglipConfig
from anystory_core.bases.flux.model import PARTS, build_model
from anystory_core.convert import main
from anystory_core.errors import CheckpointError
from anystory_core.weights.checkpoint import read_header
from anystory_core.weights.convert import flux_release as opening
from anystory_core.weights.convert.flux import convert_flux
from anystory_core.weights.flux import load_flux_model

# What no tensor of the file tells is the release's.
TINY = dataclasses.replace(
    CONFIG, name="flux", vision=SiglipConfig(width=12), redux=ReduxConfig(rank=3),
    reference=FluxConfig().reference,
)  # fmt: skip
PROCESSOR = "transformer_blocks.2.attn.processor"
HEAD_DIM = CONFIG.transformer.head_dim
Change = Callable[[flux_release.File], None]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return flux_release.write(tmp_path, TINY)


def convert(files: tuple[Path, Path], **kw: Any) -> Any:
    out = files[0].parent / "out.safetensors"
    return convert_flux(*files, out, head_dim=HEAD_DIM, **kw)


def change(files: tuple[Path, Path], edit: Change) -> None:
    content = torch.load(files[0], weights_only=True)
    edit(content)
    torch.save(content, files[0])


def read(path: Path) -> tuple[FluxConfig, dict[str, Tensor]]:
    with safe_open(str(path), "pt") as file:
        config = FluxConfig.from_json(file.metadata()["anystory.config"])
        return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def dense(tensors: dict[str, Tensor], branch: str) -> Tensor:
    """All slices of a branch multiplied out."""
    ups = sorted(n for n in tensors if n.startswith(f"{branch}.up.") and n.endswith("weight"))
    downs = tensors[f"{branch}.down.weight"].chunk(len(ups))
    return torch.cat([tensors[up] @ down for up, down in zip(ups, downs, strict=True)])


def product(group: dict[str, Tensor], module: str) -> Tensor:
    start = f"transformer.{module}.lora_"
    return group[f"{start}B.weight"] @ group[f"{start}A.weight"]


@pytest.mark.parametrize("bias", [True, False])
def test_every_tensor_finds_its_place(tmp_path: Path, bias: bool) -> None:
    torch.manual_seed(0)
    files = flux_release.write(tmp_path, TINY, bias=bias)
    done = convert(files)
    assert done.notes == () and not done.kept and done.parts == tuple(PARTS)
    source = torch.load(files[0], weights_only=True)
    config, tensors = read(done.path)
    branches = dataclasses.replace(TINY.branches, reference_bias=bias, router_bias=bias)
    assert config == dataclasses.replace(TINY, branches=branches)
    state = build_model(config, device="meta").state_dict()
    assert {n: x.shape for n, x in tensors.items()} == {n: x.shape for n, x in state.items()}
    reference, router = source["ref"], source["router"]
    image, text = "branches.reference.", "branches.router."
    for ours, group, modules in (
        (f"{image}input", reference, ["x_embedder"]),
        (f"{image}double_blocks.1.modulation", reference, ["transformer_blocks.1.norm1.linear"]),
        (
            f"{image}double_blocks.1.qkv",
            reference,
            [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"],
        ),
        (f"{image}double_blocks.0.proj", reference, ["transformer_blocks.0.attn.to_out.0"]),
        (f"{image}double_blocks.0.mlp", reference, ["transformer_blocks.0.ff.net.2"]),
        (f"{text}input", router, ["context_embedder"]),
        (
            f"{text}double_blocks.0.modulation",
            router,
            ["transformer_blocks.0.norm1_context.linear"],
        ),
        (
            f"{text}double_blocks.1.qkv",
            router,
            [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
        ),
        (f"{text}double_blocks.1.proj", router, ["transformer_blocks.1.attn.to_add_out"]),
        (f"{text}double_blocks.1.mlp", router, ["transformer_blocks.1.ff_context.net.2"]),
        *(
            (
                f"{side}single_blocks.2.{branch}",
                group,
                [f"single_transformer_blocks.2.{name}" for name in names],
            )
            for side, group in ((image, reference), (text, router))
            for branch, names in (
                ("modulation", ["norm.linear"]),
                ("linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
                ("linear2", ["proj_out"]),
            )
        ),
    ):  # fmt: skip
        expected = torch.cat([product(group, module) for module in modules])
        assert torch.allclose(dense(tensors, ours), expected, atol=1e-6), ours
        if bias:
            key = f"transformer.{modules[-1]}.lora_B.bias"
            assert torch.equal(tensors[f"{ours}.up.{len(modules) - 1}.bias"], group[key])
    for index, block in ((1, "transformer_blocks.0"), (5, "single_transformer_blocks.2")):
        for ours, theirs in (("query", "q"), ("key", "k")):
            start = f"transformer.{block}.attn.processor.to_{theirs}_routing_map_lora_"
            branch = f"branches.maps.{index}.{ours}"
            assert torch.equal(tensors[f"{branch}.down.weight"], router[f"{start}A.weight"])
            assert torch.equal(tensors[f"{branch}.up.0.weight"], router[f"{start}B.weight"])
            assert torch.equal(tensors[f"{branch}.up.0.bias"], router[f"{start}B.bias"])
    with safe_open(str(files[1]), "pt") as base:
        for part, group, prefix in (
            ("subject", source["redux"], ""),
            ("routing", router, "router_embedder."),
        ):
            start = f"redux.{part}."
            assert torch.equal(
                tensors[f"{start}redux_up.weight"], base.get_tensor("redux_up.weight")
            )
            assert torch.equal(tensors[f"{start}gate.weight"], group[f"{prefix}gate_proj.weight"])
            key = f"{prefix}redux_down_lora_B.bias"
            assert torch.equal(tensors[f"{start}down_branch.up.0.bias"], group[key])  # fmt: skip


def test_the_same_sources_are_converted_once(files: tuple[Path, Path]) -> None:
    first = convert(files)
    assert convert(files).kept and not first.kept
    change(files, lambda c: c["redux"].update({"gate_proj.bias": torch.ones(1)}))
    assert not convert(files).kept


def test_layers_of_redux_in_the_file_replace_the_base(files: tuple[Path, Path]) -> None:
    own = torch.ones(60, 12)
    change(files, lambda c: c["router"].update({"router_embedder.redux_up.weight": own}))
    _, tensors = read(convert(files).path)
    assert torch.equal(tensors["redux.routing.redux_up.weight"], own)
    assert not torch.equal(tensors["redux.subject.redux_up.weight"], own)


@pytest.mark.parametrize(
    ("bin_type", "redux_type", "asked", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
        (torch.float16, torch.float16, None, torch.float16),
        (torch.float32, torch.bfloat16, None, torch.float32),
        (torch.float16, torch.bfloat16, None, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_number_type_is_the_sources(
    tmp_path: Path, bin_type: torch.dtype, redux_type: torch.dtype, asked: Any, expected: Any
) -> None:
    files = flux_release.write(tmp_path, TINY, dtype=bin_type)
    save_file(flux_release.redux(TINY, redux_type), files[1])
    _, tensors = read(convert(files, dtype=asked).path)
    assert {tensor.dtype for tensor in tensors.values()} == {expected}


def alphas(value: Any) -> Change:
    def edit(content: flux_release.File) -> None:
        for name, _, _ in flux_release.modules(TINY, text=False):
            content["ref"][f"transformer.{name}.alpha"] = torch.tensor(value)

    return edit


def test_alpha_scales_branch_and_bias(files: tuple[Path, Path]) -> None:
    change(files, alphas(2.0))  # of rank 4
    source = torch.load(files[0], weights_only=True)["ref"]
    _, tensors = read(convert(files).path)
    expected = product(source, "single_transformer_blocks.0.proj_out") / 2
    branch = "branches.reference.single_blocks.0.linear2"
    assert torch.allclose(dense(tensors, branch), expected, atol=1e-6)
    bias = source["transformer.single_transformer_blocks.0.proj_out.lora_B.bias"] / 2
    assert torch.allclose(tensors[f"{branch}.up.0.bias"], bias)


def other_rank(content: flux_release.File) -> None:
    for x, shape in (("A", (2, 32)), ("B", (32, 2))):
        key = f"transformer.transformer_blocks.1.attn.to_k.lora_{x}.weight"
        content["ref"][key] = torch.randn(shape)


def test_mixed_ranks_ask_who_is_right(files: tuple[Path, Path]) -> None:
    change(files, other_rank)
    question = r"ranks of 'ref' differ .*Choose mixed_ranks \(--mixed-ranks\) first"
    with pytest.raises(CheckpointError, match=question):
        convert(files)
    source = torch.load(files[0], weights_only=True)["ref"]
    expected = product(source, "transformer_blocks.1.attn.to_k")
    for choice, scale in (("one", 1.0), ("first", 2.0)):  # first rank 4, own rank 2
        _, tensors = read(convert(files, mixed_ranks=choice).path)
        k = dense(tensors, "branches.reference.double_blocks.1.qkv")[32:64]
        assert torch.allclose(k, scale * expected, atol=1e-5)


def test_mixed_ranks_with_alpha_are_clear(files: tuple[Path, Path]) -> None:
    change(files, other_rank)
    change(files, alphas(4.0))
    source = torch.load(files[0], weights_only=True)["ref"]
    _, tensors = read(convert(files).path)
    k = dense(tensors, "branches.reference.double_blocks.1.qkv")[32:64]
    assert torch.allclose(k, 2 * product(source, "transformer_blocks.1.attn.to_k"), atol=1e-5)


def test_unknown_tensors_are_left_out_with_a_note(files: tuple[Path, Path]) -> None:
    def edit(content: flux_release.File) -> None:
        content["ref"]["transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight"] = torch.ones(
            2, 2
        )
        content["router"]["router_embedder.strange"] = torch.ones(1)
        content["later"] = {}

    change(files, edit)
    (later, note) = convert(files).notes
    assert "'later'" in later
    assert "2 tensors" in note and "ff.net.0.proj" in note and "report" in note


def drop(group: str, name: str) -> Change:
    return lambda content: content[group].__delitem__(name) and None


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("ref", "transformer.x_embedder.lora_A.weight"),
        ("ref", "transformer.transformer_blocks.1.attn.to_out.0.lora_B.weight"),
        ("ref", "transformer.single_transformer_blocks.0.proj_mlp.lora_B.bias"),
        ("redux", "gate_proj.bias"),
        ("router", "router_embedder.gate_proj.weight"),
        ("router", "transformer.context_embedder.lora_B.weight"),
        ("router", f"transformer.single_{PROCESSOR}.to_k_routing_map_lora_B.bias"),
    ],
)
def test_a_missing_tensor_is_named(files: tuple[Path, Path], group: str, name: str) -> None:
    change(files, drop(group, name))
    with pytest.raises(CheckpointError, match="missing") as error:
        convert(files)
    said = str(error.value)
    assert said.startswith(f"{files[0].name}: ") and f"tensors of {group!r}" in said
    assert name in said and not (files[0].parent / "out.safetensors").exists()


def put(group: str, name: str, value: Any) -> Change:
    return lambda content: content[group].update({name: value})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (put("ref", "transformer.x_embedder.lora_B.weight", torch.ones(30, 4)), "has shape"),
        (put("ref", "transformer.x_embedder.lora_A.weight", torch.ones(5, 16)), "columns"),
        (put("ref", "transformer.x_embedder.lora_A.weight", torch.ones(4)), "2 axes"),
        (put("redux", "gate_proj.weight", torch.ones(1, 21)), "redux.subject.gate.weight"),
        (put("redux", "gate_proj.bias", torch.tensor([torch.nan])),
         r"not finite; anystory\S* is damaged"),
        (put("redux", "gate_proj.bias", torch.ones(1, dtype=torch.int64)), "plain floats"),
        (put("redux", "gate_proj.bias", "one"), "expected a tensor"),
        (put("router", "router_embedder.gate_proj.bias", torch.ones(1, 1)), "1 axes"),
        (put("router", f"transformer.single_{PROCESSOR}.to_q_routing_map_lora_A.weight",
             torch.ones(3)),
         "2 axes"),
        (alphas(math.nan), r"alpha is nan, expected one finite number"),
        (alphas([1.0, 2.0]), r"alpha has shape \(2,\), expected one finite number"),
        (lambda c: c.pop("router"), r"\['router'\] missing"),
        (lambda c: c.update(ref=[1]), r"\['ref'\] missing"),
        (lambda c: c["ref"].clear(), "another file"),
    ],
)  # fmt: skip
def test_another_file_is_refused(files: tuple[Path, Path], edit: Any, said: str) -> None:
    change(files, edit)
    with pytest.raises(CheckpointError, match=said) as error:
        convert(files)
    assert files[0].name in str(error.value)
    assert not (files[0].parent / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": torch.ones(2)}, "not FLUX.1-Redux"),
        (flux_release.redux(dataclasses.replace(TINY, vision=SiglipConfig(width=10))), "width"),
    ],
)
def test_another_redux_is_refused(files: tuple[Path, Path], tensors: Any, said: str) -> None:
    save_file(tensors, files[1])
    with pytest.raises(CheckpointError, match=said):
        convert(files)


def test_a_redux_that_is_not_finite_is_named(files: tuple[Path, Path]) -> None:
    tensors = load_file(files[1])
    tensors["redux_up.weight"][0, 0] = torch.nan
    save_file(tensors, files[1])
    with pytest.raises(CheckpointError, match=f"not finite; {files[1].name} is damaged"):
        convert(files)
    assert not (files[0].parent / "out.safetensors").exists()


class Trap:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, (str(Path.cwd() / "trap"), "w"))


def test_a_pickle_with_code_is_refused_and_not_run(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files[0].parent)
    torch.save({**torch.load(files[0], weights_only=True), "extra": Trap()}, files[0])
    with pytest.raises(CheckpointError, match="weights-only reader refuses"):
        convert(files)
    assert not (files[0].parent / "trap").exists()


def test_old_pytorch_is_refused_by_name(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("2.5.1+cu124", "1.13.0", "strange"):
        monkeypatch.setattr(opening.torch, "__version__", version)
        with pytest.raises(CheckpointError, match=r"PyTorch 2\.6"):
            convert(files)


def test_files_of_other_kinds_are_refused(files: tuple[Path, Path]) -> None:
    whole = files[0].read_bytes()
    for content in (b"", b"PK", whole[:1000], whole[: len(whole) // 2], whole[:-30], b"\x80\x02."):
        files[0].write_bytes(content)
        with pytest.raises(CheckpointError, match="cut off, or damaged"):
            convert(files)
    torch.save([torch.ones(1)], files[0])
    with pytest.raises(CheckpointError, match="holds a list"):
        convert(files)
    torch.save({"a": 1}, files[0], _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="no file of torch.save"):
        convert(files)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        convert((files[0].parent / "none.bin", files[1]))


def test_a_file_that_was_not_converted_is_kept(files: tuple[Path, Path]) -> None:
    out = files[0].parent / "out.safetensors"
    save_file({"a": torch.ones(1)}, out)
    with pytest.raises(CheckpointError, match="not made by conversion"):
        convert(files)


def test_command_line(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """With the head width of FLUX.1, which a width of 32 does not have."""
    out = str(files[0].parent / "out.safetensors")
    assert main(["flux", *map(str, files), out]) == 1
    assert "error: anystory_flux.bin: FluxTransformerConfig.heads: got 0" in capsys.readouterr().err
    wide = dataclasses.replace(
        TINY, transformer=dataclasses.replace(TINY.transformer, width=128, heads=1)
    )
    files = flux_release.write(files[0].parent, wide)
    assert main(["flux", *map(str, files), out, "--dtype", "bf16"]) == 0
    assert "subject_redux, routing_redux" in capsys.readouterr().out
    model = load_flux_model(out)
    assert model.config == wide and model.routes and model.fingerprint
    with pytest.raises(CheckpointError, match="for flux, expected some for sdxl"):
        read_header(out)


def test_names_of_the_result(files: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        convert_flux(*files, files[0].parent / "out.bin")
    with pytest.raises(CheckpointError, match="one of the sources"):
        convert_flux(*files, files[1])
