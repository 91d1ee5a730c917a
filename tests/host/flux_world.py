"""A tiny FLUX in this process: models, subjects, and short ways to route, apply and sample."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import flux_parts
import torch
from flux_net import POOLED
from flux_scene import CONFIG
from scene import halves, picture
from torch import Tensor

TEXT = 7


class FluxWorld:
    """Models, two encoded subjects, and short ways to route, apply and sample."""

    def __init__(self, comfy: ModuleType, pack: ModuleType, mini: SimpleNamespace) -> None:
        torch.set_num_threads(1)
        self.comfy, self.pack, self.mini = comfy, pack, mini
        self.core = f"{pack.__name__.rpartition('.')[0]}.anystory_core"
        self.errors = self.module("errors")
        self.anystory = flux_parts.anystory(pack.__name__)
        self.model = flux_parts.flux_patcher()
        self.clip_vision, self.vae = flux_parts.siglip(), mini.vae
        self.subjects = [self.encode(i, label=name) for i, name in enumerate(("ball", "box"))]
        self.positive = self.prompt(1)

    def module(self, name: str) -> Any:
        """A module of the core as the pack imports it."""
        return importlib.import_module(f"{self.core}.{name}")

    def encode(self, number: int, **inputs: Any) -> Any:
        image, mask = picture(number)
        given = {
            "anystory": self.anystory,
            "clip_vision": self.clip_vision,
            "vae": self.vae,
            "image": image,
            "mask": mask,
        }
        return self.pack.EncodeSubject.execute(**{**given, **inputs}).args[0]

    def prompt(self, seed: int, guidance: float = 3.5) -> Any:
        """A conditioning with random states."""
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(1, TEXT, CONFIG.transformer.context_dim, generator=generator)
        pooled = torch.randn(1, POOLED, generator=generator)
        return [[states, {"pooled_output": pooled, "guidance": guidance}]]

    def route(self, *subjects: Any, mode: str = "learned", masks: Any = ()) -> Any:
        inputs = {f"subject_{i}": s for i, s in enumerate(subjects or self.subjects, 1)}
        inputs |= {f"mask_{i}": m for i, m in enumerate(masks, 1)}
        return self.pack.SubjectRouter.execute(anystory=self.anystory, mode=mode, **inputs).args[0]

    def apply(self, routing: Any = None, model: Any = None, **settings: Any) -> Any:
        return self.apply_with_maps(routing, model, **settings)[0]

    def apply_with_maps(self, routing: Any = None, model: Any = None, **settings: Any) -> Any:
        return self.pack.ApplyAnyStory.execute(
            model=model or self.model, routing=routing or self.route(), **settings
        ).args

    def latent(self, height: int = 8, width: int = 10, batch: int = 1) -> dict[str, Any]:
        return {"samples": torch.zeros(batch, CONFIG.transformer.channels, height, width)}

    def sample(self, model: Any = None, **options: Any) -> Tensor:
        """KSampler's latent (B,4,h,w)."""
        given = {
            "seed": 0,
            "steps": 6,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": self.positive,
            "negative": self.prompt(2),
            "latent_image": self.latent(),
            "denoise": 1.0,
        }
        model = self.model if model is None else model
        (latent,) = self.comfy.KSampler().sample(model, **{**given, **options})
        return latent["samples"]

    @staticmethod
    def halves() -> list[Tensor]:
        return halves()
