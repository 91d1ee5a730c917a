"""A file in the layout of the authors' ``anystory_flux.bin``, and a FLUX.1-Redux, of any size.

Names and shapes are written out here a second time, as diffusers and peft have them. By hand, with
the real sizes (2.05 GB and 129 MB of random numbers):

    PYTHONPATH=.:tests/unit python tests/unit/flux_release.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from anystory_core.bases.flux.config import FluxConfig

File = dict[str, dict[str, Tensor]]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    scale = 0.6 if len(shape) == 1 else 1.5 / shape[1] ** 0.5
    return (scale * torch.randn(shape)).to(dtype)


def modules(config: FluxConfig, *, text: bool) -> Iterator[tuple[str, int, int]]:
    """(diffusers' module, inputs, outputs) of every branch of the text or the image side."""
    sizes = config.transformer
    d, wide = sizes.width, sizes.mlp_width
    if text:
        yield "context_embedder", sizes.context_dim, d
    else:
        yield "x_embedder", sizes.token_width, d
    for i in range(sizes.double_blocks):
        block = f"transformer_blocks.{i}"
        if text:
            yield f"{block}.norm1_context.linear", d, 6 * d
            for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                yield f"{block}.attn.{name}", d, d
            yield f"{block}.ff_context.net.2", wide, d
        else:
            yield f"{block}.norm1.linear", d, 6 * d
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                yield f"{block}.attn.{name}", d, d
            yield f"{block}.ff.net.2", wide, d
    for i in range(sizes.single_blocks):
        block = f"single_transformer_blocks.{i}"
        yield f"{block}.norm.linear", d, 3 * d
        for name in ("to_q", "to_k", "to_v"):
            yield f"{block}.attn.{name}", d, d
        yield f"{block}.proj_mlp", d, wide
        yield f"{block}.proj_out", d + wide, d


def adapter(config: FluxConfig, *, text: bool, bias: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    rank = config.branches.router_rank if text else config.branches.reference_rank
    out: dict[str, Tensor] = {}
    for name, inputs, outputs in modules(config, text=text):
        out[f"transformer.{name}.lora_A.weight"] = random(rank, inputs, dtype=dtype)
        out[f"transformer.{name}.lora_B.weight"] = random(outputs, rank, dtype=dtype)
        if bias:
            out[f"transformer.{name}.lora_B.bias"] = random(outputs, dtype=dtype)
    return out


def embedder(config: FluxConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, outputs, rank = config.vision.width, config.transformer.context_dim, config.redux.rank
    hidden = outputs * config.redux.hidden_ratio
    return {
        "redux_up_lora_A.weight": random(rank, inputs, dtype=dtype),
        "redux_up_lora_B.weight": random(hidden, rank, dtype=dtype),
        "redux_up_lora_B.bias": random(hidden, dtype=dtype),
        "redux_down_lora_A.weight": random(rank, hidden, dtype=dtype),
        "redux_down_lora_B.weight": random(outputs, rank, dtype=dtype),
        "redux_down_lora_B.bias": random(outputs, dtype=dtype),
        "gate_proj.weight": random(1, outputs, dtype=dtype),
        "gate_proj.bias": random(1, dtype=dtype),
    }


def release(config: FluxConfig, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> File:
    """The content of the file."""
    router = adapter(config, text=True, bias=bias, dtype=dtype)
    own = embedder(config, dtype)
    router |= {f"router_embedder.{name}": tensor for name, tensor in own.items()}
    sizes, rank = config.transformer, config.branches.routing_map_rank
    blocks = [f"transformer_blocks.{i}" for i in range(sizes.double_blocks)]
    blocks += [f"single_transformer_blocks.{i}" for i in range(sizes.single_blocks)]
    for block in blocks:
        for name in "qk":
            start = f"transformer.{block}.attn.processor.to_{name}_routing_map_lora_"
            router[f"{start}A.weight"] = random(rank, sizes.width, dtype=dtype)
            router[f"{start}B.weight"] = random(sizes.width, rank, dtype=dtype)
            router[f"{start}B.bias"] = random(sizes.width, dtype=dtype)
    reference = adapter(config, text=False, bias=bias, dtype=dtype)
    return {"ref": reference, "redux": embedder(config, dtype), "router": router}


def redux(config: FluxConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The layers of FLUX.1-Redux."""
    inputs, outputs = config.vision.width, config.transformer.context_dim
    hidden = outputs * config.redux.hidden_ratio
    return {
        "redux_up.weight": random(hidden, inputs, dtype=dtype),
        "redux_up.bias": random(hidden, dtype=dtype),
        "redux_down.weight": random(outputs, hidden, dtype=dtype),
        "redux_down.bias": random(outputs, dtype=dtype),
    }


def write(
    folder: Path, config: FluxConfig, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """Both files; their paths."""
    files = folder / "anystory_flux.bin", folder / "flux1-redux-dev.safetensors"
    torch.save(release(config, bias=bias, dtype=dtype), files[0])
    save_file(redux(config, dtype), files[1])
    return files


if __name__ == "__main__":
    for path in write(Path(sys.argv[1]), FluxConfig(), bias=True, dtype=torch.bfloat16):
        print(path, path.stat().st_size)
