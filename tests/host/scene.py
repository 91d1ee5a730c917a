"""What tests in the host need again and again: subjects, conditionings, a sampler, other packs."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

SIZE = 128  # pixels: 8x8 and 4x4 tokens, a fifth of a second per step


def module(name: str) -> Any:
    """A module of the pack or of the host; imported late, when the host is on the path."""
    return importlib.import_module(name)


def picture(number: int, size: int = 96) -> tuple[Tensor, Tensor]:
    """A made-up subject: IMAGE (1,size,size,3) and MASK (1,size,size), 1 = subject."""
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None], axis[None, :]
    ball = x * x + y * y < 0.5
    box = (x.abs() < 0.6) & (y.abs() < 0.6)
    kite = (x.abs() - 0.6 < y * 0.6) & (y < 0.7)
    mask = (ball, box, kite)[number % 3].expand(size, size).float()
    colour = torch.tensor([(0.9, 0.1, 0.1), (0.1, 0.2, 0.9), (0.1, 0.8, 0.3)][number % 3])
    texture = torch.rand(size, size, 1, generator=torch.Generator().manual_seed(number)) * 0.3 + 0.7
    rgb = colour * texture * mask[..., None] + (1 - mask[..., None])
    return rgb[None], mask[None]


def halves(size: int = 64) -> list[Tensor]:
    """Two masks: the left and the right half."""
    left = torch.zeros(1, size, size)
    left[:, :, : size // 2] = 1
    return [left, 1 - left]


class Scene:
    """The mini model, three encoded subjects, and short ways to route, apply and sample."""

    def __init__(self, comfy: ModuleType, pack: ModuleType, mini: SimpleNamespace) -> None:
        torch.set_num_threads(1)  # tensors are small: waiting for a second thread costs more
        self.comfy, self.pack, self.mini = comfy, pack, mini
        self.errors = module("anystory_pack.anystory_core.errors")
        self.passes = module("anystory_pack.nodes.host.sdxl.passes")
        self.ids = module("anystory_pack.nodes.host.ids")
        names = ("ball", "box", "kite")
        self.subjects = [self.encode(i, label=name) for i, name in enumerate(names)]
        self.positive = self.text("a ball beside a box")
        self.negative = self.text("")

    def encode(self, number: int, **inputs: Any) -> Any:
        image, mask = picture(number)
        return self.encode_picture(image, mask=mask, **inputs)

    def encode_picture(self, image: Tensor, **inputs: Any) -> Any:
        mini = self.mini
        given = {"anystory": mini.anystory, "clip_vision": mini.clip_vision, "vae": mini.vae}
        return self.pack.EncodeSubject.execute(**{**given, "image": image, **inputs}).args[0]

    def text(self, words: str) -> Any:
        return self.comfy.CLIPTextEncode().encode(self.mini.clip, words)[0]

    def route(self, *subjects: Any, mode: str = "learned", masks: Any = (), **settings: Any) -> Any:
        chosen = subjects or self.subjects[:2]
        inputs = {f"subject_{i}": s for i, s in enumerate(chosen, 1)}
        inputs |= {f"mask_{i}": m for i, m in enumerate(masks, 1)}
        return self.pack.SubjectRouter.execute(
            anystory=self.mini.anystory, mode=mode, **inputs, **settings
        ).args[0]

    def apply(self, model: Any = None, routing: Any = None, **settings: Any) -> Any:
        """The patched model."""
        return self.apply_with_maps(model, routing, **settings)[0]

    def apply_with_maps(self, model: Any = None, routing: Any = None, **settings: Any) -> Any:
        return self.pack.ApplyAnyStory.execute(
            model=model or self.mini.model, routing=routing or self.route(), **settings
        ).args

    def latent(self, width: int = SIZE, height: int = SIZE, batch: int = 1) -> dict[str, Any]:
        return self.comfy.EmptyLatentImage().generate(width, height, batch)[0]

    def sample(self, model: Any, **options: Any) -> Tensor:
        """KSampler's latent (B,4,h,w)."""
        given: dict[str, Any] = {
            "seed": 1,
            "steps": 2,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "positive": self.positive,
            "negative": self.negative,
            "denoise": 1.0,
        }
        given |= options
        if "latent_image" not in given:
            given["latent_image"] = self.latent()
        # Some packs draw random numbers while they sample; two runs must draw the same ones.
        torch.manual_seed(7)
        return self.comfy.KSampler().sample(model, **given)[0]["samples"]

    def guide(self, guider: Any, steps: int = 2, seed: int = 1) -> Tensor:
        """SamplerCustomAdvanced's latent with any guider."""
        custom = module("comfy_extras.nodes_custom_sampler")
        samplers = module("comfy.samplers")
        sigmas = samplers.calculate_sigmas(
            guider.model_patcher.get_model_object("model_sampling"), "normal", steps
        )
        noise = custom.Noise_RandomNoise(seed)
        sampler = samplers.sampler_object("euler")
        return custom.SamplerCustomAdvanced.execute(
            noise, guider, sampler, sigmas, self.latent()
        ).args[0]["samples"]

    def split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The host believes that memory holds one cond only: every cond is a call of its own."""
        model = self.mini.model.model
        monkeypatch.setattr(model, "memory_required", lambda *_, **__: 1e30)

    def preview(self, maps: Any, latent: Tensor, **inputs: Any) -> Any:
        return self.pack.RoutingMapPreview.execute(maps=maps, latent={"samples": latent}, **inputs)
