"""A FLUX of plain torch layers under the host's names, for tests without a host.

It runs as the host's does: blocks write into their inputs, attention is called after norm and
rotation, and a call of ours is asked at the same points.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from anystory_core.bases.flux.call import FluxCall
from anystory_core.bases.flux.config import FluxTransformerConfig
from anystory_core.bases.flux.host import condition_vector, modulate, rotate, split_heads

AXES, THETA, POOLED = (4, 6, 6), 10_000, 24


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,H,Q,h) -> (B,Q,H*h)."""
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = nn.RMSNorm(width, eps=1e-6)
        self.key_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class Side(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = Norm(width // heads)
        self.proj = nn.Linear(width, width)


class Modulation(nn.Module):
    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, parts * width)


def _mlp(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU("tanh"), nn.Linear(inner, width))


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class Double(nn.Module):
    def __init__(self, sizes: FluxTransformerConfig) -> None:
        super().__init__()
        d = sizes.width
        for side in ("img", "txt"):
            setattr(self, f"{side}_mod", Modulation(d, 6))
            setattr(self, f"{side}_norm1", _norm(d))
            setattr(self, f"{side}_attn", Side(d, sizes.heads))
            setattr(self, f"{side}_norm2", _norm(d))
            setattr(self, f"{side}_mlp", _mlp(d, sizes.mlp_width))


class Single(nn.Module):
    def __init__(self, sizes: FluxTransformerConfig) -> None:
        super().__init__()
        d = sizes.width
        self.linear1 = nn.Linear(d, 3 * d + sizes.mlp_width)
        self.linear2 = nn.Linear(d + sizes.mlp_width, d)
        self.norm = Norm(d // sizes.heads)
        self.pre_norm = _norm(d)
        self.mlp_act = nn.GELU("tanh")
        self.modulation = Modulation(d, 3)


class Embedder(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


class Last(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class Net(nn.Module):
    """``forward`` of the host's Flux with the points at which a call acts."""

    def __init__(self, sizes: FluxTransformerConfig) -> None:
        super().__init__()
        self.params = SimpleNamespace(
            guidance_embed=True, vec_in_dim=POOLED, patch_size=sizes.patch_size
        )
        self.hidden_size, self.num_heads = sizes.width, sizes.heads
        self.img_in = nn.Linear(sizes.token_width, sizes.width)
        self.txt_in = nn.Linear(sizes.context_dim, sizes.width)
        self.time_in = Embedder(256, sizes.width)
        self.guidance_in = Embedder(256, sizes.width)
        self.vector_in = Embedder(POOLED, sizes.width)
        self.double_blocks = nn.ModuleList(Double(sizes) for _ in range(sizes.double_blocks))
        self.single_blocks = nn.ModuleList(Single(sizes) for _ in range(sizes.single_blocks))
        self.final_layer = Last(sizes.width, sizes.token_width)

    def pe_embedder(self, ids: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for axis, size in enumerate(AXES):
            rates = THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles = ids[..., axis, None].double() * rates
            rows = angles.cos(), -angles.sin(), angles.sin(), angles.cos()
            parts.append(torch.stack(rows, dim=-1).unflatten(-1, (2, 2)))
        return torch.cat(parts, dim=-3)[:, None].to(self.img_in.weight.dtype)

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        call: FluxCall | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """tokens (B,M,4C) -> (B,M,4C). context (B,S,C) is already extended."""
        img, txt = self.img_in(tokens), self.txt_in(context)
        vec = condition_vector(self, t, guidance, pooled, img)
        y, x = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        image_ids = torch.stack((0 * y, y, x), dim=-1).flatten(0, 1)
        ids = torch.cat((torch.zeros(txt.shape[1], 3), image_ids))[None]
        positions = self.pe_embedder(ids)
        for number, block in enumerate(self.double_blocks):
            if call is not None and call.routes_itself:
                txt, img = call.double(number, block, txt, img, vec, positions, mask)
            else:
                img, txt = self._double(number, block, img, txt, vec, positions, call, mask)
        x = torch.cat((txt, img), dim=1)
        for number, block in enumerate(self.single_blocks):
            if call is not None and call.routes_itself:
                x = call.single(number, block, x, vec, positions, mask)
            else:
                x = self._single(number, block, x, vec, positions, call, mask)
        x = x[:, txt.shape[1] :]
        shift, scale = self.final_layer.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.final_layer.linear(modulate(_norm(x.shape[-1])(x), shift, scale))

    def _attend(
        self, index: int, qkv: Any, positions: Tensor, call: FluxCall | None, mask: Tensor | None
    ) -> Tensor:
        q, k, v = qkv
        q, k = rotate(q, positions), rotate(k, positions)
        if call is None:
            return attention(q, k, v, mask)
        return call.attend(index, q, k, v, mask)

    def _double(
        self, number: int, block: Any, img: Tensor, txt: Tensor, vec: Tensor, positions: Tensor,
        call: FluxCall | None, mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        silu, heads = nn.functional.silu(vec)[:, None], self.num_heads
        mods = [m.lin(silu).chunk(6, dim=-1) for m in (block.img_mod, block.txt_mod)]
        sides: list[tuple[Tensor, Tensor, Tensor]] = []
        for x, norm, side, m in (
            (txt, block.txt_norm1, block.txt_attn, mods[1]),
            (img, block.img_norm1, block.img_attn, mods[0]),
        ):
            q, k, v = split_heads(side.qkv(modulate(norm(x), m[0], m[1])), heads)
            sides.append((*side.norm(q, k, v), v))
        joined = [torch.cat(parts, dim=2) for parts in zip(*sides, strict=True)]
        out = self._attend(number + 1, joined, positions, call, mask)
        length = txt.shape[1]
        for x, part, name, m in (
            (img, out[:, length:], "img", mods[0]),
            (txt, out[:, :length], "txt", mods[1]),
        ):
            x += m[2] * getattr(block, f"{name}_attn").proj(part)
            hat = modulate(getattr(block, f"{name}_norm2")(x), m[3], m[4])
            x += m[5] * getattr(block, f"{name}_mlp")(hat)
        return img, txt

    def _single(
        self, number: int, block: Any, x: Tensor, vec: Tensor, positions: Tensor,
        call: FluxCall | None, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        d = x.shape[-1]
        shift, scale, gate = block.modulation.lin(nn.functional.silu(vec)[:, None]).chunk(3, -1)
        both = block.linear1(modulate(block.pre_norm(x), shift, scale))
        q, k, v = split_heads(both[..., : 3 * d], self.num_heads)
        q, k = block.norm(q, k, v)
        index = len(self.double_blocks) + number + 1
        out = self._attend(index, (q, k, v), positions, call, mask)
        x += gate * block.linear2(torch.cat((out, block.mlp_act(both[..., 3 * d :])), dim=-1))
        return x


def shake(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights that keep activations near 1, norms that differ from 1."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if "query_norm" in name or "key_norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(0.2 * noise)
            elif ".up." in name:
                p.copy_(0.6 * noise)
            else:
                p.copy_(1.5 * noise / p.shape[1] ** 0.5)
