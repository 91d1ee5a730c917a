"""The mini VAE: TAESD's layout (f8, 4 channels), trained on the world's pictures.

Three steps. Both halves together, with a hint: a latent's mean colour is a fixed linear map of it;
without that the green-magenta axis stays at zero in encoder and decoder alike, each waiting for the
other. Then latents are whitened (zero mean, unit covariance; folded into the encoder's last
convolution), so the latent format has scale 1. Then the decoder alone, which learns the whitened
latents behind TAESD's soft clamp at +-3, and may be trained on at any time: latents stay the same.
It sees larger crops, of which less is border, and a little noise in the latents, for those that are
drawn are not as clean as those that are encoded.
"""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional

from ..phase import Phase, autocast, first_makes, shares
from ..world.emoji import Emoji
from ..world.render import SIZE, UInt8, pool_of, render_reference, render_scene
from ..world.scenes import read_shard

SCENES = 4  # of one batch
CROP, CROPS_EACH = 48, 3
DECODED_CROP = 96  # and one of each scene
DECODER_STEPS = 6000
DECODED_NOISE = 0.2  # the most that is added to its latents, in their own deviation of 1
_ON_SUBJECT = 0.75  # share of crops that are centred on a subject's pixel
_SPREAD_WEIGHT = 0.05
_HUE_WEIGHT = 2.0
_HINT = ((0.34, 0.63, -0.17), (-0.42, 0.15, 0.14), (0.54, 0.20, 0.13), (0.33, 0.47, 0.66))


def build_vae(seed: int = 1) -> Any:
    """TAESD as diffusers has it, initialised for training from scratch without normalisation:
    every residual branch starts at zero. :func:`host_state` gives ComfyUI's names."""
    vae = cast(Any, AutoencoderTiny)()
    generator = torch.Generator().manual_seed(seed)
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith("conv.4"):
            nn.init.zeros_(module.weight)
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(0.5)
        vae.decoder.layers[-1].weight.mul_(0.2)
        vae.decoder.layers[-1].bias.fill_(0.5)
    return vae


def host_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' AutoencoderTiny names -> TAESD's own, as the host recognises them. The decoder's
    list begins with a clamp there, hence the shifted numbers."""
    out = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, tensor in state.items():
        side, _, number, *rest = name.split(".")
        index = int(number) + (side == "decoder")
        out[".".join((f"taesd_{side}", str(index), *rest))] = tensor
    return out


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 (B,H,W,3) -> float (B,3,H,W) in [-1,1]."""
    return pictures.movedim(-1, 1).float() / 127.5 - 1


def _crops(pool: list[list[Emoji]], step: int, side: int, each: int) -> Tensor:
    """(B,3,side,side), channels last: ``each`` of every scene or reference, most of them on a
    subject."""
    rng = random.Random(step)
    out: list[UInt8] = []
    for i in range(SCENES):
        seed = 10_000_000 + step * SCENES + i
        if rng.random() < 0.8:
            scene = render_scene(pool, seed)
            picture, masks = scene.picture, [instance.mask for instance in scene.instances]
        else:
            picture, mask = render_reference(rng.choice(rng.choice(pool)), seed)
            masks = [mask]
        for _ in range(each):
            y, x = rng.randrange(SIZE), rng.randrange(SIZE)
            if masks and rng.random() < _ON_SUBJECT:
                ys, xs = np.nonzero(rng.choice(masks))
                if len(ys):
                    at = rng.randrange(len(ys))
                    y, x = int(ys[at]), int(xs[at])
            y = min(max(y - side // 2, 0), SIZE - side)
            x = min(max(x - side // 2, 0), SIZE - side)
            out.append(picture[y : y + side, x : x + side])
    return to_signed(torch.from_numpy(np.stack(out))).to(memory_format=torch.channels_last)


def reconstruction_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 of pixels, of neighbouring differences (sharp edges) and of 4x4 and 8x8 means (without
    which whole hues stay wrong for a long time)."""
    loss = (a - b).abs().mean()
    for dim in (-1, -2):
        loss = loss + (a.diff(dim=dim) - b.diff(dim=dim)).abs().mean()
    for side in (4, 8):
        loss = loss + functional.avg_pool2d(a - b, side).abs().mean()
    return loss


def phase(folder: Path) -> Phase:
    """Encoder and decoder together; its rate and seed."""
    return Phase(name="vae", folder=folder, steps=3600, learning_rate=1e-3, seed=1, ema=0.995)


def decoder_phase(folder: Path, steps: int = DECODER_STEPS) -> Phase:
    """The decoder on, once the latents are fixed."""
    return Phase(name="decoder", folder=folder, steps=steps, learning_rate=5e-4, seed=4, ema=0.998)


@torch.no_grad()
def whiten(vae: Any, pixels: Tensor) -> None:
    """Fold into the encoder's last convolution the map that gives its latents of ``pixels`` zero
    mean and unit covariance; into the decoder's first, the inverse (exact but for the clamp)."""
    with autocast():
        latents = vae.encode(pixels).latents
    latents = latents.movedim(1, -1).reshape(-1, 4).double()
    mean = latents.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(latents.t()))
    forth = (vectors / values.sqrt() @ vectors.t()).float()
    back = (vectors * values.sqrt() @ vectors.t()).float()
    last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
    last.weight.copy_(torch.einsum("oc,cikl->oikl", forth, last.weight))
    last.bias.copy_(forth @ (last.bias - mean.float()))
    first.bias.add_(torch.einsum("ockl,c->o", first.weight, mean.float()))
    first.weight.copy_(torch.einsum("ockl,ci->oikl", first.weight, back))


def finish_encoder(folder: Path) -> None:
    """Whiten the trained VAE on rendered scenes, once: ``folder/vae.whitened.pt``."""
    vae = build_vae().to(memory_format=torch.channels_last)
    phase(folder).load(vae)
    pictures = read_shard(folder / "scenes", 0).pictures[:100]
    pixels = to_signed(torch.from_numpy(pictures.copy()))
    whiten(vae, pixels)
    factors, bias = rgb_factors(vae, pixels)
    print(f"vae: previews, for config.py: {factors.tolist()}, {bias.tolist()}", flush=True)
    temporary = folder / "vae.whitened.tmp"
    torch.save(vae.state_dict(), temporary)
    os.replace(temporary, folder / "vae.whitened.pt")


def load_vae(folder: Path) -> Any:
    """The whitened VAE, with the decoder as far as it is trained, in evaluation mode."""
    vae = build_vae().to(memory_format=torch.channels_last)
    first_makes(folder / "vae.whitened.pt", partial(finish_encoder, folder))
    vae.load_state_dict(torch.load(folder / "vae.whitened.pt", weights_only=True))
    decoding = decoder_phase(folder)
    if decoding.state_file.exists():
        decoding.load(vae.decoder)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def rgb_factors(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from latents to mean colours in [-1,1]: factors (4,3) and bias (3,)."""
    latents = vae.encode(pixels).latents.movedim(1, -1).reshape(-1, 4)
    colours = functional.avg_pool2d(pixels, 8).movedim(1, -1).reshape(-1, 3)
    ones = torch.ones(latents.shape[0], 1)
    solution = torch.linalg.lstsq(torch.cat((latents, ones), dim=1), colours).solution
    return solution[:4], solution[4]


def train_decoder(emoji: list[Emoji], folder: Path, steps: int) -> None:
    """Train the decoder on, or resume."""
    pool = pool_of(emoji)
    vae = load_vae(folder)
    decoder = vae.decoder.requires_grad_(True)
    part, parts = shares()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        at = 10_000_000 + step * parts + part
        pixels = _crops(pool, at, DECODED_CROP, 1)
        with autocast():
            with torch.no_grad():
                latents = vae.encode(pixels).latents
            noise = torch.randn(latents.shape, generator=generator)
            amount = torch.rand(len(latents), 1, 1, 1, generator=generator)
            latents = latents + DECODED_NOISE * amount * noise
            restored = vae.decode(latents).sample
        return reconstruction_loss(restored.float(), pixels)

    decoder_phase(folder, steps).run(decoder, loss_of)


def train_vae(emoji: list[Emoji], folder: Path) -> None:
    """Train or resume."""
    pool = pool_of(emoji)
    vae = build_vae().to(memory_format=torch.channels_last)
    part, parts = shares()
    colours = torch.tensor(_HINT)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        pixels = _crops(pool, step * parts + part, CROP, CROPS_EACH)
        with autocast():
            latents = vae.encode(pixels).latents
            restored = vae.decode(latents).sample
        latents = latents.float()
        spread = latents.mean(dim=(0, 2, 3)).square() + (latents.std(dim=(0, 2, 3)) - 1).square()
        colour = torch.einsum("bchw,cr->brhw", latents, colours)
        hue = functional.mse_loss(colour, functional.avg_pool2d(pixels, 8))
        extra = _SPREAD_WEIGHT * spread.mean() + _HUE_WEIGHT * hue
        return reconstruction_loss(restored.float(), pixels) + extra

    phase(folder).run(vae, loss_of)
