"""The reference stream: keys and values of the subjects' pictures at every block.

Each picture runs once through the image side of the transformer, at timestep 0 and beside its own
low-rank branches; it attends to itself alone. Nothing flows into it from text, image or router, so
one pass serves a whole sampling run of a prompt: its keys and values depend on the picture, the
pooled text, the guidance and the base's weights.

Positions are those of the image shifted left by the width of a reference, the same for all
pictures. Only the tokens that the subject's mask touches are kept: for the others the authors add
-100 to the logits, which is the same.

Axes: V pictures, G tokens of a picture, H heads, h width of a head, d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .host import (
    DoubleBlock,
    Flux,
    HeadAttention,
    SingleBlock,
    condition_vector,
    finite,
    modulate,
    rotate,
    split_heads,
)
from .low_rank import DoubleBranches, SingleBranches, StreamBranches


@dataclass(frozen=True)
class HeadKeys:
    """Keys and values (R,H,G,h), normalised and rotated; R is 1 or B."""

    k: Tensor
    v: Tensor

    def rows(self, batch: int) -> HeadKeys:
        """Expanded to ``batch`` rows."""
        if self.k.shape[0] == batch:
            return self
        shape = batch, -1, -1, -1
        return HeadKeys(self.k.expand(shape), self.v.expand(shape))

    @property
    def tokens(self) -> int:
        """G."""
        return self.k.shape[2]


@dataclass(frozen=True)
class References:
    """Keys and values of N subjects at all blocks: ``blocks[l - 1][i]``; None: subject i has no
    reference."""

    blocks: tuple[tuple[HeadKeys | None, ...], ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(
            x.numel() * x.element_size()
            for block in self.blocks
            for keys in block
            if keys is not None
            for x in (keys.k, keys.v)
        )


def patches(latents: Tensor, patch: int) -> Tensor:
    """(V,C,h,w) -> tokens (V,h/p*w/p,C*p*p), channel first, then row and column of the patch."""
    views, channels, height, width = latents.shape
    cut = latents.reshape(views, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def reference_ids(grid: int, device: torch.device) -> Tensor:
    """(1,grid*grid,3): t = 0, row, and column - grid."""
    y, x = torch.meshgrid(
        torch.arange(grid, dtype=torch.float32, device=device),
        torch.arange(grid, dtype=torch.float32, device=device) - grid,
        indexing="ij",
    )
    return torch.stack((torch.zeros_like(y), y, x), dim=-1).flatten(0, 1)[None]


@torch.no_grad()
def reference_pass(
    net: Flux,
    branches: StreamBranches,
    latents: Sequence[Tensor],
    keep: Sequence[Tensor],
    *,
    guidance: Tensor | None,
    pooled: Tensor | None,
    like: Tensor,
    attention: HeadAttention,
) -> References:
    """Run every picture of N subjects through the stream.

    latents[i] (V_i,C,s,s): pictures of subject i at model scale, none for a subject without
    references; keep[i] (V_i,G) bool: the tokens inside its mask. guidance (1,) or None and pooled
    (1,P) or None are those of the prompt. ``like``: a tensor of the call, for dtype and device.
    """
    views = [x.shape[0] for x in latents]
    stacked = torch.cat([x for x in latents if x.shape[0]]).to(like)
    inside = [mask.to(like.device) for masks in keep for mask in masks]
    x = patches(stacked, net.params.patch_size)
    x = branches.input.add(net.img_in(x), x)  # (V,G,d)
    positions = net.pe_embedder(reference_ids(math.isqrt(x.shape[1]), x.device))
    zero = torch.zeros(1, device=x.device)
    vec = condition_vector(net, zero, guidance, pooled, x)
    silu = torch.nn.functional.silu(vec)[:, None]  # (1,1,d)
    stream = _Stream(net.num_heads, positions, silu, attention)
    blocks: list[tuple[HeadKeys | None, ...]] = []
    for number, block in enumerate(net.double_blocks):
        x, k, v = stream.double(block, branches.double_at(number), x)
        blocks.append(_kept(k, v, inside, views))
    last = len(net.single_blocks) - 1
    for number, block in enumerate(net.single_blocks):
        x, k, v = stream.single(block, branches.single_at(number), x, tail=number < last)
        blocks.append(_kept(k, v, inside, views))
    return References(tuple(blocks))


def _kept(
    k: Tensor, v: Tensor, inside: Sequence[Tensor], views: Sequence[int]
) -> tuple[HeadKeys | None, ...]:
    """k, v (V,H,G,h) -> the tokens inside the masks, all pictures of a subject one after the
    other: (1,H,G',h) for each subject."""
    kept = [(a[:, mask], b[:, mask]) for a, b, mask in zip(k, v, inside, strict=True)]
    subjects: list[HeadKeys | None] = []
    for count in views:
        own, kept = kept[:count], kept[count:]
        if not own:
            subjects.append(None)
            continue
        joined = (torch.cat(parts, dim=1)[None] for parts in zip(*own, strict=True))
        subjects.append(HeadKeys(*joined))
    return tuple(subjects)


@dataclass(frozen=True)
class _Stream:
    """What is the same at all blocks of one pass."""

    heads: int
    positions: Tensor
    silu: Tensor
    attention: HeadAttention

    def double(
        self, block: DoubleBlock, branches: DoubleBranches, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (V,G,d) -> x after the block, and its keys and values (V,H,G,h)."""
        m = branches.modulation.add(block.img_mod.lin(self.silu), self.silu)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=-1)
        hat = modulate(block.img_norm1(x), shift1, scale1)
        qkv = branches.qkv.add(block.img_attn.qkv(hat), hat)
        q, k, v = split_heads(qkv, self.heads)
        q, k = block.img_attn.norm(q, k, v)
        k = rotate(k, self.positions)
        out = self.attention(rotate(q, self.positions), k, v)
        x = torch.addcmul(x, gate1, branches.proj.add(block.img_attn.proj(out), out))
        expand, activate, contract = block.img_mlp
        hidden = activate(expand(modulate(block.img_norm2(x), shift2, scale2)))
        x = torch.addcmul(x, gate2, branches.mlp.add(contract(hidden), hidden))
        return finite(x), k, v

    def single(
        self, block: SingleBlock, branches: SingleBranches, x: Tensor, *, tail: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`double`. Without ``tail`` only the keys and values are made."""
        m = branches.modulation.add(block.modulation.lin(self.silu), self.silu)
        shift, scale, gate = m.chunk(3, dim=-1)
        hat = modulate(block.pre_norm(x), shift, scale)
        both = branches.linear1.add(block.linear1(hat), hat)
        width = x.shape[-1]
        q, k, v = split_heads(both[..., : 3 * width], self.heads)
        q, k = block.norm(q, k, v)
        k = rotate(k, self.positions)
        if not tail:
            return x, k, v
        out = self.attention(rotate(q, self.positions), k, v)
        hidden = torch.cat((out, block.mlp_act(both[..., 3 * width :])), dim=-1)
        x = torch.addcmul(x, gate, branches.linear2.add(block.linear2(hidden), hidden))
        return finite(x), k, v
