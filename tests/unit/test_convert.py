"""Public weights -> our file: every tensor is the right one."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.names import ldm_to_diffusers
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.errors import CheckpointError
from anystory_core.training import initial
from anystory_core.weights.checkpoint import load_model, read_header
from anystory_core.weights.convert import write as convert_write
from anystory_core.weights.convert.conversion import convert
from anystory_core.weights.fingerprint import file_sha256
from anystory_core.weights.model import build_model

from .public_weights import adapter_state, diffusers_unet, ldm_state, run, save, small_config

CONFIG = small_config()


@pytest.mark.parametrize("kind", ["simplified", "original", "none"])
def test_every_tensor_comes_from_its_source(tmp_path, unet, adapter, kind) -> None:
    done, tensors = run(tmp_path, unet, adapter, reference_net=kind)
    model = load_model(done.path)
    assert model.parts == done.parts
    assert model.config.subject_qformer.queries == 16
    assert model.config.subject_qformer.layers == 4
    assert model.config.subject_qformer.heads == 2
    sites = {site.index: site for site in build_sites(CONFIG.unet)}
    prefix = "model.diffusion_model."
    for name, tensor in tensors.items():
        if name.startswith("encoder.subject."):
            expected = adapter["image_proj." + name.removeprefix("encoder.subject.")]
        elif name.startswith("projections.clip."):
            _, _, index, member, _ = name.split(".")
            expected = adapter[f"ip_adapter.{sites[int(index)].ip_adapter}.{member}_ip.weight"]
        elif name.startswith("projections.reference."):
            _, _, index, member, _ = name.split(".")
            expected = unet[f"{prefix}{sites[int(index)].ldm}.attn1.{member}.weight"]
        else:
            expected = unet[prefix + name.removeprefix("reference_net.")]
        if name == "reference_net.input_blocks.0.0.weight":
            assert torch.equal(tensor[:, 4:], torch.zeros_like(tensor[:, 4:]))
            tensor = tensor[:, :4]
        assert torch.equal(tensor, expected), name
    attn2 = [name for name in tensors if ".attn2." in name]
    assert bool(attn2) == (kind == "original")
    assert model.config.reference.cross_attention == (kind == "original")
    assert ("reference_net" in model.parts) == (kind != "none")


def test_original_reference_net_is_the_unet(tmp_path, adapter) -> None:
    """With cross-attention, its features are the U-Net's own ``norm1`` outputs at timestep 0, for
    any mask; without, they are not."""
    base = diffusers_unet(CONFIG)
    base.save_pretrained(tmp_path / "unet")
    ip = save(tmp_path / "plus.safetensors", adapter)
    nets = {}
    for kind in ("original", "simplified"):
        done = convert(
            tmp_path / "unet",
            ip,
            tmp_path / f"{kind}.safetensors",
            config=CONFIG,
            reference_net=kind,
            dtype=torch.float32,
        )
        nets[kind] = load_model(done.path).reference_net
    sites = build_sites(CONFIG.unet)
    expected: dict[int, Tensor] = {}
    for site in sites:

        def keep(module, args, output, index=site.index) -> None:
            expected[index] = output

        base.get_submodule(f"{site.diffusers}.norm1").register_forward_hook(keep)
    # the ReferenceNet's label vector is zero; diffusers would embed sizes into it
    base.add_embedding.register_forward_pre_hook(lambda m, args: (torch.zeros_like(args[0]),))
    make = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 4, 8, 8, generator=make)
    mask = torch.rand(1, 1, 8, 8, generator=make)
    context = torch.randn(1, 5, CONFIG.unet.context_dim, generator=make)
    added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        base(latents, 0, context, added_cond_kwargs=added)
        features = nets["original"](torch.cat((latents, mask), dim=1), context)
        other = nets["simplified"](torch.cat((latents, mask), dim=1))
    assert len(features) == len(sites) - 1
    for site, feature, simple in zip(sites[1:], features, other, strict=True):
        # float32, sums in another order
        assert torch.allclose(feature, expected[site.index], atol=2e-4), site.label
        assert not torch.allclose(simple, expected[site.index], atol=1e-2)


def test_diffusers_layouts_give_the_same_file(tmp_path, adapter) -> None:
    """Folder, shards, single U-Net file and diffusers' own adapter names: equal tensors."""
    base = diffusers_unet(CONFIG)
    theirs = base.state_dict()
    back = {}
    for name, named in ldm_to_diffusers(CONFIG).items():
        back[f"model.diffusion_model.{name}"] = theirs[named]
    _, single = run(tmp_path / "single", back, adapter)

    base.save_pretrained(tmp_path / "whole" / "unet")
    base.save_pretrained(tmp_path / "shards" / "unet", max_shard_size="1MB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 2
    groups = {
        group: {
            k.removeprefix(f"{group}."): v for k, v in adapter.items() if k.startswith(f"{group}.")
        }
        for group in ("image_proj", "ip_adapter")
    }
    base._load_ip_adapter_weights([groups], low_cpu_mem_usage=False)
    inside = save(tmp_path / "inside.safetensors", base.state_dict())
    assert any("encoder_hid_proj.image_projection_layers" in k for k in load_file(inside))
    plus = save(tmp_path / "plus.safetensors", adapter)
    for checkpoint, ip in (
        (tmp_path / "whole", plus),
        (tmp_path / "whole" / "unet", inside),
        (tmp_path / "shards", plus),
        (inside, inside),
    ):
        done = convert(
            checkpoint, ip, tmp_path / "b.safetensors", config=CONFIG, dtype=torch.float32
        )
        tensors = load_file(done.path)
        assert tensors.keys() == single.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, single[name]), (checkpoint.name, name)


def test_header_names_the_sources(tmp_path, unet, adapter) -> None:
    done, _ = run(tmp_path, unet, adapter, dtype=torch.bfloat16)
    header = read_header(done.path)
    checkpoint = header.metadata["anystory.source.checkpoint"]
    digest = file_sha256(tmp_path / "base.safetensors")
    assert checkpoint == f"base.safetensors sha256:{digest}"
    assert header.metadata["anystory.source.ip_adapter"].startswith("plus.safetensors sha256:")
    assert set(header.dtypes.values()) == {"BF16"}
    assert done.size == done.path.stat().st_size


def test_a_file_made_in_the_same_way_is_kept(tmp_path, unet, adapter) -> None:
    """Not written again; but it is when a source, the net, the numbers or its own size differ."""
    done, _ = run(tmp_path, unet, adapter)
    assert not done.kept

    def again(**options) -> bool:
        written: list[tuple[int, int]] = []
        options = {"progress": lambda *step: written.append(step), **options}
        result, tensors = run(tmp_path, unet, adapter, **options)
        # A kept file's sources are read, for their checksums, and nothing is written.
        assert result.kept == (written[-1][0] < written[-1][1])
        assert len(tensors) == len(load_file(done.path)) and result.parts
        assert result.size == done.path.stat().st_size
        return result.kept

    assert again()
    assert not again(reference_net="original") and again(reference_net="original")
    assert not again(reference_net="none")
    assert not again() and not again(dtype=torch.float16) and again(dtype=torch.float16)
    with open(done.path, "ab") as file:
        file.write(b"x")
    assert not again(dtype=torch.float16)
    key = "model.diffusion_model.middle_block.0.in_layers.2.bias"
    unet = {**unet, key: unet[key] + 1}
    assert not again(dtype=torch.float16)
    changed = load_file(done.path)["reference_net.middle_block.0.in_layers.2.bias"]
    assert torch.equal(changed, unet[key].half())


def test_progress_counts_bytes(tmp_path, unet, adapter) -> None:
    """Both sources read once for their checksums, and every tensor written."""
    seen: list[tuple[int, int]] = []
    _, tensors = run(tmp_path, unet, adapter, progress=lambda *step: seen.append(step))
    read = sum((tmp_path / f"{name}.safetensors").stat().st_size for name in ("base", "plus"))
    written = sum(4 * x.numel() for x in tensors.values())
    first = 4 * next(iter(tensors.values())).numel()
    assert {total for _, total in seen} == {read + written}
    counts = [count for count, _ in seen]
    assert counts == sorted(set(counts)) and counts[-1] == read + written
    assert read in counts and read + first in counts


def test_v_prediction_is_used_and_said(tmp_path, unet, adapter) -> None:
    done, tensors = run(tmp_path / "v", {**unet, "v_pred": torch.tensor([])}, adapter)
    _, plain = run(tmp_path / "plain", unet, adapter)
    assert "predicts v" in done.notes[0]
    assert all(torch.equal(tensors[k], plain[k]) for k in plain)
    header = {"modelspec.prediction_type": "v"}  # some files say so in their header alone
    said, ip = save(tmp_path / "said.safetensors", unet, **header), tmp_path / "plus.safetensors"
    done = convert(said, save(ip, adapter), tmp_path / "h.safetensors", config=CONFIG)
    assert "predicts v" in done.notes[0]
    diffusers_unet(CONFIG).save_pretrained(tmp_path / "folder" / "unet")
    scheduler = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction"}))
    ip = save(tmp_path / "plus.safetensors", adapter)
    done = convert(tmp_path / "folder", ip, tmp_path / "c.safetensors", config=CONFIG)
    assert "predicts v" in done.notes[0]


def command_line(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "anystory_core.convert", *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )


def test_command_line(tmp_path) -> None:
    """It writes what :func:`convert` writes, and says so; the second time it keeps the file."""
    mini = AnyStoryConfig.mini()
    checkpoint = save(tmp_path / "base.safetensors", ldm_state(mini))
    names = list(diffusers_unet(mini).attn_processors)
    ip = save(tmp_path / "plus.safetensors", adapter_state(names, mini))
    out, options = tmp_path / "out" / "made.safetensors", ("--config", "mini", "--dtype", "bf16")
    for ending in ("", ", kept: it was made like this before"):
        done = command_line("--checkpoint", checkpoint, "--ip-adapter", ip, "--out", out, *options)
        assert (done.returncode, done.stderr) == (0, "")
        said = f"{out}: {out.stat().st_size / 1e9:.2f} GB, "
        assert done.stdout.startswith(said) and done.stdout.endswith(f"projections){ending}\n")
    own = convert(
        checkpoint, ip, tmp_path / "own.safetensors", config=mini, dtype=torch.bfloat16
    ).path
    assert own.read_bytes() == out.read_bytes()
    alone = command_line("--ip-adapter", ip, "--out", out, "--reference-net", "none", *options)
    assert alone.returncode == 0
    assert load_model(out).parts == ("subject_encoder", "clip_projections")


def test_command_line_refuses(tmp_path, adapter) -> None:
    """A wrong file ends with its message and code 1."""
    ip = save(tmp_path / "plus.safetensors", adapter)
    done = command_line("--out", tmp_path / "o.txt", "--ip-adapter", ip, "--checkpoint", ip)
    assert done.returncode == 1
    assert done.stderr.startswith("error: o.txt: expected a name that ends in .safetensors")
    assert "Traceback" not in done.stderr


def test_memory_does_not_grow_with_the_file(tmp_path) -> None:
    """One tensor at a time: 256 MiB written in 8 MiB tensors raise the peak by far less."""
    shapes = {f"t{i}": (1024, 4096) for i in range(32)}
    make = torch.Generator().manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = {}

    def tensor(name: str) -> Tensor:
        value = torch.rand(1024, 4096, generator=make)
        seen[name] = float(value[0, 0])
        return value

    path = tmp_path / "big.safetensors"
    convert_write.write_streaming(
        path, shapes, tensor, dtype=torch.float16, metadata={"a": "b"}, origin=str
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 128, f"peak grew by {grown:.0f} MiB"
    loaded = load_file(path)
    for name, first in seen.items():
        assert float(loaded[name][0, 0]) == torch.tensor(first).half().float()


def test_streamed_bytes_equal_the_librarys(tmp_path) -> None:
    """What is read back equals what the library's own writer stores, odd sizes included."""
    make = torch.Generator().manual_seed(3)
    shapes = {"z": (3, 5), "a": (7,), "m": (2, 3, 1, 1), "one": (1,)}
    tensors = {name: torch.randn(*shape, generator=make) for name, shape in shapes.items()}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
        convert_write.write_streaming(
            ours, shapes, tensors.__getitem__, dtype=dtype, metadata={"k": "v"}, origin=str
        )
        save_file({k: v.to(dtype) for k, v in tensors.items()}, theirs)
        a, b = load_file(ours), load_file(theirs)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(CheckpointError, match=r"z: got shape \(7,\), expected \(3, 5\)"):
        convert_write.write_streaming(
            tmp_path / "n.safetensors",
            {"z": (3, 5)},
            lambda name: tensors["a"],
            dtype=torch.float32,
            metadata={},
            origin=str,
        )


def test_training_may_start_from_an_adapter(tmp_path, unet, adapter) -> None:
    """The same tensors as in a converted file, QFormer included, and nothing else of the model is
    touched."""
    _, converted = run(tmp_path, unet, adapter)
    torch.manual_seed(0)
    sizes = initial.with_ip_adapter_sizes(CONFIG, tmp_path / "plus.safetensors")
    model = build_model(sizes)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    initial.load_ip_adapter(model, tmp_path / "plus.safetensors")
    for name, tensor in model.state_dict().items():
        taken = name.startswith(("projections.clip.", "encoder.subject."))
        wanted = converted if taken else before
        assert torch.equal(tensor, wanted[name]), name
    broken = save(tmp_path / "broken.safetensors", dict(list(adapter.items())[:-1]))
    after = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        initial.load_ip_adapter(model, broken)
    assert all(torch.equal(x, after[name]) for name, x in model.state_dict().items())


def test_sdxl_names_are_the_public_ones() -> None:
    """SDXL: 70 adapters, numbered 1, 3 ... 139 in the public file, the middle block's last."""
    sites = build_sites(AnyStoryConfig.sdxl().unet)
    assert sorted(site.ip_adapter for site in sites) == list(range(1, 140, 2))
    middle = [site.ip_adapter for site in sites if site.part == "middle"]
    assert middle == list(range(121, 140, 2))
