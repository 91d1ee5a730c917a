"""A block of the host with the router's tokens beside its own, by the block's own layers.

No patch point shows a block's keys before their norm, which the routing map reads, so in the calls
that route by the router a block is computed here. Router tokens go through the host's layers in one
call with the tokens of the text side (with all tokens in a single block): weights that are streamed
to the device are streamed once.

Axes: B rows, A routed rows, S text and subject tokens, M image tokens, P router tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .host import (
    DoubleBlock,
    HeadAttention,
    SingleBlock,
    finite,
    modulate,
    rotate,
    split_heads,
)
from .low_rank import DoubleBranches, RoutingMap, SingleBranches
from .router import image_keys, subject_queries


@dataclass(frozen=True)
class Tokens:
    """The streams between two blocks. In the single blocks ``text`` and ``image`` are views of one
    tensor. ``router`` (B,P,d)."""

    text: Tensor
    image: Tensor
    router: Tensor


@dataclass(frozen=True)
class Guide:
    """What a block asks while it runs.

    take: the routed rows of a batch (B,...) -> (A,...). found: receives the mean queries of the
    subjects (A,N,h) and the mean keys of the image (A,M,h), before attend is called. attend: q, k,
    v (B,H,S+M,h) of the main sequence -> (B,S+M,d). attention: plain, for the router's tokens.
    lengths: router tokens of each subject. last: no block follows, so the router's tokens end here.
    """

    heads: int
    lengths: tuple[int, ...]
    take: Callable[[Tensor], Tensor]
    found: Callable[[Tensor, Tensor], None]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: HeadAttention
    last: bool = False


def double_block(
    block: DoubleBlock,
    branches: DoubleBranches,
    routing_map: RoutingMap,
    tokens: Tokens,
    vec: Tensor,
    positions: Tensor,
    guide: Guide,
) -> Tokens:
    """One double block; vec (B,d), positions (B or 1,1,S+M,...) of text and image. Router tokens
    stand at position 0, where the rotation does nothing."""
    text, image, router = tokens.text, tokens.image, tokens.router
    length, width, heads = text.shape[1], image.shape[-1], guide.heads
    silu = torch.nn.functional.silu(vec)[:, None]
    shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2 = block.img_mod.lin(silu).chunk(6, -1)
    base = block.txt_mod.lin(silu)
    shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = base.chunk(6, -1)
    own = base + branches.modulation(silu)
    shift_r, scale_r, gate_r, shift_r2, scale_r2, gate_r2 = own.chunk(6, -1)

    hat_i = modulate(block.img_norm1(image), shift_i, scale_i)
    hat_r = modulate(block.txt_norm1(router), shift_r, scale_r)
    hat_t = modulate(block.txt_norm1(text), shift_t, scale_t)
    qkv_i = block.img_attn.qkv(hat_i)
    qkv_t = block.txt_attn.qkv(torch.cat((hat_t, hat_r), dim=1))

    qkv_r = qkv_t[:, length:]
    q_map = guide.take(qkv_r[..., :width] + routing_map.query(hat_r))
    k_map = guide.take(qkv_i)[..., width : 2 * width] + routing_map.key(guide.take(hat_i))
    q_map = block.txt_attn.norm.query_norm(_heads(q_map, heads))
    k_map = block.img_attn.norm.key_norm(_heads(k_map, heads))
    image_positions = _rows(positions[:, :, length:], guide)
    guide.found(subject_queries(q_map, guide.lengths), image_keys(k_map, image_positions))

    branches.qkv.add(qkv_r, hat_r)
    q_i, k_i, v_i = split_heads(qkv_i, heads)
    q_i, k_i = block.img_attn.norm(q_i, k_i, v_i)
    q_t, k_t, v_t = split_heads(qkv_t, heads)
    q_t, k_t = block.txt_attn.norm(q_t, k_t, v_t)
    q = rotate(torch.cat((q_t[:, :, :length], q_i), dim=2), positions)
    k = rotate(torch.cat((k_t[:, :, :length], k_i), dim=2), positions)
    v = torch.cat((v_t[:, :, :length], v_i), dim=2)
    out = guide.attend(q, k, v)
    out_r = guide.attention(
        q_t[:, :, length:],
        torch.cat((k[:, :, length:], k_t[:, :, length:]), dim=2),
        torch.cat((v_i, v_t[:, :, length:]), dim=2),
    )

    image = torch.addcmul(image, gate_i, block.img_attn.proj(out[:, length:]))
    out_t = torch.cat((out[:, :length], out_r), dim=1)
    projected = block.txt_attn.proj(out_t)
    branches.proj.add(projected[:, length:], out_r)
    text = torch.addcmul(text, gate_t, projected[:, :length])
    router = torch.addcmul(router, gate_r, projected[:, length:])

    expand, activate, contract = block.img_mlp
    hidden = activate(expand(modulate(block.img_norm2(image), shift_i2, scale_i2)))
    image = torch.addcmul(image, gate_i2, contract(hidden))
    expand, activate, contract = block.txt_mlp
    hat_t = modulate(block.txt_norm2(text), shift_t2, scale_t2)
    hat_r = modulate(block.txt_norm2(router), shift_r2, scale_r2)
    hidden = activate(expand(torch.cat((hat_t, hat_r), dim=1)))
    contracted = contract(hidden)
    branches.mlp.add(contracted[:, length:], hidden[:, length:])
    text = torch.addcmul(text, gate_t2, contracted[:, :length])
    router = torch.addcmul(router, gate_r2, contracted[:, length:])
    return Tokens(finite(text), image, finite(router))


def single_block(
    block: SingleBlock,
    branches: SingleBranches,
    routing_map: RoutingMap,
    x: Tensor,
    router: Tensor,
    start: int,
    vec: Tensor,
    positions: Tensor,
    guide: Guide,
) -> tuple[Tensor, Tensor]:
    """One single block: x (B,S+M,d) = [text, image] with the image from token ``start`` = S on,
    router (B,P,d) -> both after the block."""
    length, width, heads = x.shape[1], x.shape[-1], guide.heads
    silu = torch.nn.functional.silu(vec)[:, None]
    base = block.modulation.lin(silu)
    shift, scale, gate = base.chunk(3, -1)
    shift_r, scale_r, gate_r = (base + branches.modulation(silu)).chunk(3, -1)
    hat = modulate(block.pre_norm(x), shift, scale)
    hat_r = modulate(block.pre_norm(router), shift_r, scale_r)
    both = block.linear1(torch.cat((hat, hat_r), dim=1))  # (B,S+M+P,3d+mlp)

    q_map = guide.take(both[:, length:, :width] + routing_map.query(hat_r))
    keys = guide.take(both)[:, start:length, width : 2 * width]
    k_map = keys + routing_map.key(guide.take(hat)[:, start:])
    q_map = block.norm.query_norm(_heads(q_map, heads))
    k_map = block.norm.key_norm(_heads(k_map, heads))
    image_positions = _rows(positions[:, :, start:], guide)
    guide.found(subject_queries(q_map, guide.lengths), image_keys(k_map, image_positions))

    if not guide.last:
        branches.linear1.add(both[:, length:], hat_r)
    q, k, v = split_heads(both[..., : 3 * width], heads)
    q, k = block.norm(q, k, v)
    q_main, k_main = rotate(q[:, :, :length], positions), rotate(k[:, :, :length], positions)
    out = guide.attend(q_main, k_main, v[:, :, :length])
    if guide.last:
        hidden = torch.cat((out, block.mlp_act(both[:, :length, 3 * width :])), dim=-1)
        return finite(torch.addcmul(x, gate, block.linear2(hidden))), router
    out_r = guide.attention(
        q[:, :, length:],
        torch.cat((k_main[:, :, start:], k[:, :, length:]), dim=2),
        v[:, :, start:],
    )
    hidden = torch.cat((torch.cat((out, out_r), dim=1), block.mlp_act(both[..., 3 * width :])), -1)
    contracted = block.linear2(hidden)
    branches.linear2.add(contracted[:, length:], hidden[:, length:])
    x = torch.addcmul(x, gate, contracted[:, :length])
    return finite(x), finite(torch.addcmul(router, gate_r, contracted[:, length:]))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(A,X,d) -> (A,H,X,h)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _rows(positions: Tensor, guide: Guide) -> Tensor:
    """Positions of the routed rows; those of one row serve all."""
    return positions if positions.shape[0] == 1 else guide.take(positions)
