"""AnyStory on FLUX written out in float64: one row, one stream, one block after the other.

Low-rank branches are multiplied out to dense matrices, every mask is dense, all references of all
subjects stay in every key list. Nothing here is shared with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass
class Person:
    """One subject: tokens of the text stream (n,C) at their strength or None, router tokens (m,C),
    references (V,G,4C) as packed latents or None with the mask (V,G), gamma."""

    concept: Tensor | None
    routing: Tensor
    references: Tensor | None
    inside: Tensor
    gamma: float = 0.0


@dataclass
class Result:
    """tokens (M,4C); routes[l - 1] (M,) with the number of subjects for nobody; the least distance
    between the two best logits of any token."""

    tokens: Tensor
    routes: list[Tensor] = field(default_factory=list[Tensor])
    margin: float = math.inf


class Flux:
    """net: the host's weights by name; branches: ours by name without their part's prefix."""

    def __init__(
        self, net: Weights, reference: Weights, router: Weights, maps: Weights, *,
        heads: int, doubles: int, singles: int, axes: Sequence[int], theta: float = 10_000,
    ) -> None:  # fmt: skip
        self.net = {name: x.double() for name, x in net.items()}
        self.branch = {
            stream: {name: x.double() for name, x in given.items()}
            for stream, given in (("ref", reference), ("rou", router), ("map", maps))
        }
        self.heads, self.doubles, self.singles = heads, doubles, singles
        self.axes, self.theta = axes, theta

    def layer(self, name: str, x: Tensor) -> Tensor:
        return x @ self.net[f"{name}.weight"].T + self.net[f"{name}.bias"]

    def delta(self, stream: str, name: str, x: Tensor) -> Tensor:
        """Every slice: its rows of A, its B, its bias."""
        given = self.branch[stream]
        slices = sorted(k for k in given if k.startswith(f"{name}.up.") and k.endswith(".weight"))
        rows = given[f"{name}.down.weight"].chunk(len(slices))
        out: list[Tensor] = []
        for a, key in zip(rows, slices, strict=True):
            bias = given.get(key.replace("weight", "bias"), torch.zeros(()))
            out.append(x @ (given[key] @ a).T + bias)
        return torch.cat(out, dim=-1)

    def side(self, stream: str, host: str, ours: str, x: Tensor) -> Tensor:
        return self.layer(host, x) + self.delta(stream, ours, x)

    def split(self, x: Tensor) -> Tensor:
        """(X,d) -> (X,H,h)."""
        return x.reshape(x.shape[0], self.heads, x.shape[-1] // self.heads)

    def rms(self, name: str, x: Tensor) -> Tensor:
        found = [self.net[f"{name}.{k}"] for k in ("weight", "scale") if f"{name}.{k}" in self.net]
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * found[0]

    def turn(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (X,H,h) by the positions ids (X,3): pairs of numbers as complex ones."""
        angles = [
            ids[:, axis, None].double() / self.theta ** (torch.arange(0, size, 2).double() / size)
            for axis, size in enumerate(self.axes)
        ]
        angle = torch.cat(angles, dim=-1)[:, None]  # (X,1,h/2)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q (Q,H,h), k and v (K,H,h), bias (Q,K) -> (Q,d)."""
        logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        if bias is not None:
            logits = logits + bias
        return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).flatten(1)

    def vec(self, t: float, guidance: float, pooled: Tensor) -> Tensor:
        def embed(name: str, x: Tensor) -> Tensor:
            hidden = torch.nn.functional.silu(self.layer(f"{name}.in_layer", x))
            return self.layer(f"{name}.out_layer", hidden)

        def waves(value: float) -> Tensor:
            # In float32, as the host does: angles of thousands lose four digits there.
            rates = torch.exp(-math.log(10_000) * torch.arange(128).float() / 128)
            angles = 1000 * torch.tensor(value, dtype=torch.float32) * rates
            return torch.cat((angles.cos(), angles.sin())).double()

        return (
            embed("time_in", waves(t))
            + embed("guidance_in", waves(guidance))
            + embed("vector_in", pooled.double())
        )

    @staticmethod
    def hat(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / deviation * (1 + scale) + shift

    def reference(
        self, tokens: Tensor, guidance: float, pooled: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """One picture (G,4C) -> its keys and values (G,H,h) at all blocks."""
        grid = int(tokens.shape[0] ** 0.5)
        ids = torch.tensor([[0, y, x - grid] for y in range(grid) for x in range(grid)])
        silu = torch.nn.functional.silu(self.vec(0.0, guidance, pooled))
        x = self.side("ref", "img_in", "input", tokens.double())
        found: list[tuple[Tensor, Tensor]] = []
        for i in range(self.doubles):
            host, ours = f"double_blocks.{i}", f"double_blocks.{i}"
            m = self.side("ref", f"{host}.img_mod.lin", f"{ours}.modulation", silu).chunk(6)
            h = self.hat(x, m[0], m[1])
            q, k, v = self.side("ref", f"{host}.img_attn.qkv", f"{ours}.qkv", h).chunk(3, -1)
            q = self.turn(self.rms(f"{host}.img_attn.norm.query_norm", self.split(q)), ids)
            k = self.turn(self.rms(f"{host}.img_attn.norm.key_norm", self.split(k)), ids)
            found.append((k, self.split(v)))
            out = self.attend(q, k, self.split(v))
            x = x + m[2] * self.side("ref", f"{host}.img_attn.proj", f"{ours}.proj", out)
            h = self.layer(f"{host}.img_mlp.0", self.hat(x, m[3], m[4]))
            h = torch.nn.functional.gelu(h, approximate="tanh")
            x = x + m[5] * self.side("ref", f"{host}.img_mlp.2", f"{ours}.mlp", h)
        for i in range(self.singles):
            x, k, v, _ = self.single(i, x, silu, "ref", ids)
            found.append((k, v))
        return found

    def single(
        self, i: int, x: Tensor, silu: Tensor, stream: str, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A single block over one stream that attends to itself; also its k, v."""
        name, d = f"single_blocks.{i}", x.shape[-1]
        m = self.side(stream, f"{name}.modulation.lin", f"{name}.modulation", silu).chunk(3)
        h = self.hat(x, m[0], m[1])
        all_ = self.side(stream, f"{name}.linear1", f"{name}.linear1", h)
        q, k, v, mlp = all_.split([d, d, d, all_.shape[-1] - 3 * d], dim=-1)
        q = self.turn(self.rms(f"{name}.norm.query_norm", self.split(q)), ids)
        k = self.turn(self.rms(f"{name}.norm.key_norm", self.split(k)), ids)
        v = self.split(v)
        both = torch.cat(
            (self.attend(q, k, v), torch.nn.functional.gelu(mlp, approximate="tanh")), dim=-1
        )
        out = self.side(stream, f"{name}.linear2", f"{name}.linear2", both)
        return x + m[2] * out, k, v, h

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], t: float, context: Tensor, pooled: Tensor,
        guidance: float, people: Sequence[Person], *, router: bool,
        regions: Tensor | None = None, allowed: Tensor | None = None,
    ) -> Result:  # fmt: skip
        """One row. Without a router and regions every query looks at everything."""
        result = Result(tokens)
        count = len(people)
        concepts = [p.concept for p in people if p.concept is not None]
        image_ids = torch.tensor([[0, y, x] for y in range(grid[0]) for x in range(grid[1])])
        text = self.layer("txt_in", torch.cat([context, *concepts]).double())
        image = self.layer("img_in", tokens.double())
        length, size = text.shape[0], image.shape[0]
        ids = torch.cat((torch.zeros(length, 3), image_ids))
        silu = torch.nn.functional.silu(self.vec(t, guidance, pooled))
        pictures = [
            (i, mask, self.reference(picture, guidance, pooled))
            for i, p in enumerate(people)
            if p.references is not None
            for picture, mask in zip(p.references, p.inside, strict=True)
        ]
        # Owner of every column (-1: all look at it) and its bias.
        owners = [-1] * context.shape[0]
        for i, p in enumerate(people):
            owners += [i] * (0 if p.concept is None else p.concept.shape[0])
        owners += [-1] * size
        biases = [0.0] * len(owners)
        for i, mask, _ in pictures:
            owners += [i] * mask.shape[0]
            biases += [people[i].gamma if inside else -math.inf for inside in mask.tolist()]
        owner, bias = torch.tensor(owners), torch.tensor(biases).double()
        stream = torch.zeros(0, text.shape[-1]).double()
        lengths = [p.routing.shape[0] for p in people]
        if router:
            routing = torch.cat([p.routing for p in people]).double()
            stream = self.side("rou", "txt_in", "input", routing)

        def find(q: Tensor, k: Tensor) -> Tensor | None:
            """Raw queries (P,d) of the router and keys (M,d) of the image, normalised heads."""
            if regions is not None:
                result.routes.append(regions)
                return regions
            if not router:
                return None
            means = torch.stack([part.mean((0, 1)) for part in q.split(lengths)])
            logits = means @ self.turn(k, image_ids).mean(1).T  # (N,M)
            if count > 1:
                top = logits.topk(2, dim=0).values
                result.margin = min(result.margin, float((top[0] - top[1]).min()))
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -math.inf)
            route = logits.argmax(0)
            if allowed is not None:
                route[~allowed.any(0)] = count
            result.routes.append(route)
            return route

        def main(q: Tensor, k: Tensor, v: Tensor, route: Tensor | None, block: int) -> Tensor:
            mask = bias.repeat(length + size, 1)
            if route is not None:
                closed = (owner >= 0) & (owner != route[:, None])
                mask[length:] = mask[length:].masked_fill(closed, -math.inf)
            keys = torch.cat([k, *(found[block][0] for _, _, found in pictures)])
            values = torch.cat([v, *(found[block][1] for _, _, found in pictures)])
            return self.attend(q, keys, values, mask)

        gelu = torch.nn.functional.gelu
        for i in range(self.doubles):
            b = f"double_blocks.{i}"
            mi = self.layer(f"{b}.img_mod.lin", silu).chunk(6)
            mt = self.layer(f"{b}.txt_mod.lin", silu).chunk(6)
            mr = self.side("rou", f"{b}.txt_mod.lin", f"{b}.modulation", silu).chunk(6)
            hi, ht = self.hat(image, mi[0], mi[1]), self.hat(text, mt[0], mt[1])
            hr = self.hat(stream, mr[0], mr[1])
            qi, ki, vi = (self.split(x) for x in self.layer(f"{b}.img_attn.qkv", hi).chunk(3, -1))
            qt, kt, vt = (self.split(x) for x in self.layer(f"{b}.txt_attn.qkv", ht).chunk(3, -1))
            plain = self.layer(f"{b}.txt_attn.qkv", hr).chunk(3, -1)[0]
            qm = self.split(plain + self.delta("map", f"{i + 1}.query", hr))
            km = ki + self.split(self.delta("map", f"{i + 1}.key", hi))
            route = find(
                self.rms(f"{b}.txt_attn.norm.query_norm", qm),
                self.rms(f"{b}.img_attn.norm.key_norm", km),
            )
            qi = self.rms(f"{b}.img_attn.norm.query_norm", qi)
            ki = self.rms(f"{b}.img_attn.norm.key_norm", ki)
            qt = self.rms(f"{b}.txt_attn.norm.query_norm", qt)
            kt = self.rms(f"{b}.txt_attn.norm.key_norm", kt)
            q, k = self.turn(torch.cat((qt, qi)), ids), self.turn(torch.cat((kt, ki)), ids)
            out = main(q, k, torch.cat((vt, vi)), route, i)
            if router:
                qr, kr, vr = (
                    self.split(x)
                    for x in self.side("rou", f"{b}.txt_attn.qkv", f"{b}.qkv", hr).chunk(3, -1)
                )
                qr = self.rms(f"{b}.txt_attn.norm.query_norm", qr)
                kr = self.rms(f"{b}.txt_attn.norm.key_norm", kr)
                seen = self.attend(qr, torch.cat((k[length:], kr)), torch.cat((vi, vr)))
                stream = stream + mr[2] * self.side("rou", f"{b}.txt_attn.proj", f"{b}.proj", seen)
                h = self.layer(f"{b}.txt_mlp.0", self.hat(stream, mr[3], mr[4]))
                h = gelu(h, approximate="tanh")
                stream = stream + mr[5] * self.side("rou", f"{b}.txt_mlp.2", f"{b}.mlp", h)
            image = image + mi[2] * self.layer(f"{b}.img_attn.proj", out[length:])
            h = gelu(
                self.layer(f"{b}.img_mlp.0", self.hat(image, mi[3], mi[4])), approximate="tanh"
            )
            image = image + mi[5] * self.layer(f"{b}.img_mlp.2", h)
            text = text + mt[2] * self.layer(f"{b}.txt_attn.proj", out[:length])
            h = gelu(self.layer(f"{b}.txt_mlp.0", self.hat(text, mt[3], mt[4])), approximate="tanh")
            text = text + mt[5] * self.layer(f"{b}.txt_mlp.2", h)

        x = torch.cat((text, image))
        d = x.shape[-1]
        for i in range(self.singles):
            b, index = f"single_blocks.{i}", self.doubles + i + 1
            m = self.layer(f"{b}.modulation.lin", silu).chunk(3)
            h = self.hat(x, m[0], m[1])
            all_ = self.layer(f"{b}.linear1", h)
            q, k, v = (self.split(part) for part in all_[:, : 3 * d].chunk(3, -1))
            mr = self.side("rou", f"{b}.modulation.lin", f"{b}.modulation", silu).chunk(3)
            hr = self.hat(stream, mr[0], mr[1])
            plain = self.layer(f"{b}.linear1", hr)[:, :d]
            qm = self.split(plain + self.delta("map", f"{index}.query", hr))
            km = k[length:] + self.split(self.delta("map", f"{index}.key", h[length:]))
            route = find(self.rms(f"{b}.norm.query_norm", qm), self.rms(f"{b}.norm.key_norm", km))
            q = self.turn(self.rms(f"{b}.norm.query_norm", q), ids)
            k = self.turn(self.rms(f"{b}.norm.key_norm", k), ids)
            out = main(q, k, v, route, self.doubles + i)
            both = torch.cat((out, gelu(all_[:, 3 * d :], approximate="tanh")), dim=-1)
            if router:
                all_r = self.side("rou", f"{b}.linear1", f"{b}.linear1", hr)
                qr, kr, vr = (self.split(part) for part in all_r[:, : 3 * d].chunk(3, -1))
                qr = self.rms(f"{b}.norm.query_norm", qr)
                kr = self.rms(f"{b}.norm.key_norm", kr)
                seen = self.attend(qr, torch.cat((k[length:], kr)), torch.cat((v[length:], vr)))
                hidden = torch.cat((seen, gelu(all_r[:, 3 * d :], approximate="tanh")), dim=-1)
                stream = stream + mr[2] * self.side("rou", f"{b}.linear2", f"{b}.linear2", hidden)
            x = x + m[2] * self.layer(f"{b}.linear2", both)
        shift, scale = self.layer("final_layer.adaLN_modulation.1", silu).chunk(2)
        result.tokens = self.layer("final_layer.linear", self.hat(x[length:], shift, scale))
        return result
