"""A base and a world small enough to train in seconds on a CPU: coloured shapes on plain ground."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from anystory_core.bases.sdxl.config import AnyStoryConfig, ReferenceConfig, UNetConfig
from anystory_core.config import ClipVisionConfig, QFormerConfig, RouterConfig
from anystory_core.data import shards
from anystory_core.training.hosts.frozen import text_encoder
from anystory_core.training.hosts.sizes import diffusers_unet_config
from anystory_core.training.hosts.unet import time_ids
from anystory_core.training.initial import ROUTER_PARTS
from anystory_core.training.schedule import alphas_cumprod
from anystory_core.weights.checkpoint import save_model
from anystory_core.weights.model import PARTS, build_model

SIZE = 64
SUBJECT_PARTS = tuple(part for part in PARTS if part not in ROUTER_PARTS)  # of stage 1's file
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 220, 50),
}
SHAPES = ("square", "disc")
KNOWN, NEW = ("red", "green"), ("blue", "yellow")  # what the base has seen; what subjects wear


def config() -> AnyStoryConfig:
    """SDXL's topology (three levels, attention on two of different depth) at toy widths."""
    unet = UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 2),
        transformer_depth=(0, 1, 2),
        middle_depth=2,
        head_dim=16,
        context_dim=32,
        adm_channels=32 + 1536,
    )
    former = QFormerConfig(queries=4, width=32, layers=1, heads=2, head_dim=16, output_dim=32)
    return AnyStoryConfig(
        name="tiny",
        unet=unet,
        clip=ClipVisionConfig(
            width=32, layers=3, heads=2, intermediate=64, image_size=56, projection_dim=16
        ),
        subject_qformer=former,
        routing_qformer=QFormerConfig(
            queries=1, width=32, layers=1, heads=2, head_dim=16, output_dim=32
        ),
        reference=ReferenceConfig(size=SIZE, latent_scale=1.0),
        router=RouterConfig(key_dim=16, heads=2),
    )


def draw(
    rng: np.random.Generator, count: int, colours: tuple[str, ...] = NEW, ground: int = 30
) -> tuple[np.ndarray, list[np.ndarray], str]:
    """A picture of ``count`` shapes side by side: (uint8 picture, masks, caption)."""
    picture = np.full((SIZE, SIZE, 3), ground, np.uint8)
    ys, xs = np.mgrid[:SIZE, :SIZE]
    masks: list[np.ndarray] = []
    words: list[str] = []
    for place in range(count):
        name = str(rng.choice(colours))
        shape = str(rng.choice(SHAPES))
        radius = int(rng.integers(18, 25) if count == 1 else rng.integers(10, 14))
        x = int(SIZE * (place + 0.5) / count + rng.integers(-3, 4))
        y = int(SIZE / 2 + rng.integers(-8, 9))
        if shape == "disc":
            mask = (ys - y) ** 2 + (xs - x) ** 2 <= radius**2
        else:
            mask = (abs(ys - y) <= radius) & (abs(xs - x) <= radius)
        picture[mask] = COLOURS[name]
        masks.append(mask)
        words.append("a shape")
    return picture, masks, " and ".join(words) or "nothing"


def pairs(count: int, seed: int = 0) -> list[tuple[str, shards.Files]]:
    """Pair samples: the same coloured shape, moved, as reference (with mask) and target."""
    out: list[tuple[str, shards.Files]] = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        state = rng.bit_generator.state
        target, _, caption = draw(rng, 1)
        rng.bit_generator.state = state
        reference, masks, _ = draw(rng, 1, ground=255)
        files = shards.pair_files(
            reference=reference, target=target, caption=caption, reference_mask=masks[0]
        )
        out.append((f"pair{i:04d}", files))
    return out


def scenes(
    count: int, seed: int = 1, shapes: tuple[int, ...] = (1, 2)
) -> list[tuple[str, shards.Files]]:
    """Scene samples of these numbers of shapes, in turn."""
    out: list[tuple[str, shards.Files]] = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        picture, masks, caption = draw(rng, shapes[i % len(shapes)])
        out.append(
            (f"scene{i:04d}", shards.scene_files(image=picture, masks=masks, caption=caption))
        )
    return out


def write_base(
    folder: Path,
    *,
    train_steps: int = 0,
    vae_width: int = 8,
    model: AnyStoryConfig | None = None,
) -> None:
    """A base folder in the layout of :mod:`anystory_core.training.hosts.frozen`, and its
    config.json; at toy widths, or at those of ``model``. A random VAE of 64 channels tells more
    colours apart than one of 8, and takes more time than all the rest of a step."""
    torch.manual_seed(0)
    model = model or config()
    clip, width = model.clip, model.unet.context_dim
    unet = UNet2DConditionModel(**diffusers_unet_config(model.unet))
    widths = (vae_width,) * 4
    vae = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=clip.width,
            intermediate_size=clip.intermediate,
            num_hidden_layers=clip.layers,
            num_attention_heads=clip.heads,
            image_size=clip.image_size,
            patch_size=clip.patch_size,
            projection_dim=clip.projection_dim,
        )
    )
    _normalise_latents(vae)
    if train_steps:
        _train_unet(unet, vae, text, train_steps)
    for name, module in (
        ("unet", unet),
        ("vae", vae),
        ("text_encoder", text),
        ("image_encoder", vision),
    ):
        module.save_pretrained(folder / name)
    (folder / "config.json").write_text(model.to_json())
    write_scheduler(folder, prediction_type="epsilon")


def write_weights(
    file: Path, *, parts: Sequence[str] = tuple(PARTS), model: AnyStoryConfig | None = None
) -> None:
    """A file of untrained weights; at toy widths, or at those of ``model``."""
    model = model or config()
    save_model(file, build_model(model, parts), model)


def write_scheduler(folder: Path, **settings: Any) -> None:
    """What diffusers writes of a pipeline's scheduler, as far as it is read."""
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))


def _pictures(count: int, colours: tuple[str, ...]) -> torch.Tensor:
    """(count,3,SIZE,SIZE) in [-1,1]."""
    pictures = [draw(np.random.default_rng((2, i)), 1 + i % 2, colours)[0] for i in range(count)]
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 127.5 - 1


@torch.no_grad()
def _normalise_latents(vae: Any) -> None:
    """A random encoder tells colours and places apart, but its latents hardly vary: scale its last
    layer so that they have mean 0 and deviate by 0.7 between pictures."""
    last = vae.encoder.layers[-1]
    latents = vae.encode(_pictures(64, KNOWN + NEW)).latents
    mean = latents.mean(dim=(0, 2, 3))
    spread = latents.std(dim=0).mean(dim=(1, 2)) / 0.7
    last.weight.div_(spread[:, None, None, None])
    last.bias.sub_(mean).div_(spread)


def _train_unet(unet: Any, vae: Any, text: Any, steps: int) -> None:
    """Denoising of shapes: enough for the stages to have something to build on."""
    encode = text_encoder([text])
    captions = ("a shape", "a shape and a shape")
    with torch.no_grad():
        latents = vae.encode(_pictures(256, KNOWN)).latents
        states, pooled = encode(captions)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    alphas = alphas_cumprod().float()
    generator = torch.Generator().manual_seed(0)
    batch = 32
    for _ in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean, caption = latents[chosen], chosen % 2
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        a = alphas[t][:, None, None, None]
        added = {
            "text_embeds": pooled[caption],
            "time_ids": time_ids(SIZE, SIZE, batch, clean.device),
        }
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        out = unet(noisy, t, states[caption], added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(out, noise)
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def run_toml(
    folder: Path, base: Path, samples: Path, stage: str, *, steps: int, **changes: dict[str, Any]
) -> Path:
    """Write a run's TOML; ``changes`` maps a table's name to values that replace or add to it."""
    tables: dict[str, dict[str, Any]] = {
        "base": {"path": str(base), "model": str(base / "config.json")},
        "data": {"paths": [str(samples)], "resolution": SIZE, "max_subjects": 2, "workers": 0},
        "run": {
            "folder": str(folder),
            "steps": steps,
            "batch": 4,
            "precision": "no",
            "checkpointing": False,
        },
        "optimiser": {"learning_rate": 1e-3},
        stage: {},
    }
    for name, values in changes.items():
        tables.setdefault(name, {}).update(values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    lines: list[str] = []
    for name, values in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n")
    return path
