"""The host in this process, a full-size SDXL U-Net of random weights, and steps of a real run.

A step is one evaluation of the guided model (positive and negative row in one call), taken from
inside the host's own sampling: a sampler hands out the function instead of looping over it. Runs
are nested, so several variants of one model are ready at once and can be timed in turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
BACKGROUND = 0.4  # share of the tokens; the subjects have equal parts of the rest
DTYPE = torch.bfloat16
FREE = 8 * 2**30  # bytes that the host believes to have: both rows in one call, the same chunks

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

Step = Callable[[], Tensor]


def keep_memory() -> None:
    """Let glibc keep what is freed, as PyTorch's allocator for GPUs does. By default every tensor
    above 32 MiB is given back to the system, which clears its pages anew when the next one is made:
    a quarter of the time of a pass with large keys."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        tune = ctypes.CDLL("libc.so.6").mallopt
        for what in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            tune(what, 2**31 - 1)


def start_host(*flags: str, gpu: bool = False) -> None:
    """Import the host's code, on the CPU unless ``gpu``, and register the pack as
    ``anystory_pack``.

    On the CPU one thread: a step's processor time is then its wall time on a machine of its own.
    What the host does by free memory does not hang on who else has some."""
    torch.set_num_threads(1)
    keep_memory()
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    options = importlib.import_module("comfy.options")
    options.args_parsing = False
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = not gpu
    for flag in flags:
        setattr(args, flag, True)
    spec = importlib.machinery.ModuleSpec("anystory_pack", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules["anystory_pack"] = importlib.util.module_from_spec(spec)
    logging.getLogger().setLevel(logging.WARNING)

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        return (FREE, FREE) if torch_free_too else FREE

    if not gpu:
        host("comfy.model_management").get_free_memory = free


def core(name: str) -> Any:
    """A module of the pack's core."""
    return importlib.import_module(f"anystory_pack.anystory_core.{name}")


def host(name: str) -> Any:
    """A module of the host, or of the pack's glue to it (``nodes.host...``)."""
    prefix = "anystory_pack." if name.startswith("nodes.") else ""
    return importlib.import_module(prefix + name)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near unit size: norms 1, biases 0.

    Billions of them: one pool of random numbers again and again, of a size that no layer has."""
    pool = torch.empty(1_000_003).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                scaled = (pool * (3 / p[0].numel()) ** 0.5).to(p)
                for part in p.view(-1).split(len(pool)):
                    part.copy_(scaled[: len(part)])
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
    module.eval().requires_grad_(False)


def make_unet(config: Any, dtype: torch.dtype = DTYPE, *, filled: bool = True) -> Any:
    """ModelPatcher of the host's SDXL, on the host's device."""
    arguments = core("mini.config").unet_arguments(config.unet)
    settings = host("comfy.supported_models").SDXL(arguments)
    settings.set_inference_dtype(dtype, None)
    device = host("comfy.model_management").get_torch_device()
    model = settings.get_model({}, "", device=device)
    if filled:
        fill(model.diffusion_model, 0)
    patcher = host("comfy.model_patcher")
    kind = getattr(patcher, "CoreModelPatcher", patcher.ModelPatcher)
    return kind(model, load_device=device, offload_device=device)


def make_anystory(
    config: Any,
    parts: Sequence[str] = ("clip_projections", "reference_projections", "routers"),
    dtype: torch.dtype = DTYPE,
    *,
    filled: bool = True,
) -> Any:
    """ManagedAnyStory with the named parts."""
    managed = host("nodes.host.managed")
    model = core("weights.model").build_model(
        config, parts, operations=managed.OPERATIONS, dtype=dtype
    )
    for number, (_, module) in enumerate(model.modules(), 1):
        if filled:
            fill(module, number)
    return managed.ManagedAnyStory(model, "random")


def make_subject(config: Any, number: int) -> Any:
    """A subject of one picture, as EncodeSubject leaves it, with random contents."""
    make = torch.Generator().manual_seed(100 + number)
    side = config.reference.size // config.reference.latent_stride

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(DTYPE)

    width, tokens = config.subject_qformer.output_dim, config.subject_qformer.queries
    features = tuple(
        normal((side // site.stride) ** 2, site.channels)
        for site in core("bases.sdxl.sites").build_sites(config.unet)[1:]
    )
    shared = torch.Generator().manual_seed(99)
    return core("subject.subject").Subject(
        label=f"subject {number}",
        tokens=normal(tokens, width),
        features=features,
        routing=normal(config.routing_dim),
        background_tokens=torch.randn((tokens, width), generator=shared).to(DTYPE),
        background_routing=torch.randn(config.routing_dim, generator=shared).to(DTYPE),
        cutout=torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        fingerprint="",
    )


def random_picture(config: Any, number: int) -> tuple[Any, Any]:
    """Views and states of a random picture with a mask, as Encode Subject has them: CLIP states and
    latents are random, the phrase, too, where the weights read one."""
    make = torch.Generator().manual_seed(number)
    preprocess = core("subject.preprocess")
    mask = torch.zeros(1, 512, 512)
    mask[:, 100:400, 150:380] = 1
    views = preprocess.prepare_views(torch.rand(1, 512, 512, 3, generator=make), mask, config)
    side = config.reference.size // config.reference.latent_stride
    grounding = config.clip_branch.grounding
    clip = 1, config.clip.tokens, config.clip.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(DTYPE)

    states = core("subject.encoder").PictureStates(
        clip=normal(*clip),
        background=torch.zeros(clip, dtype=DTYPE),
        latents=normal(1, config.unet.in_channels, side, side),
        phrase=None if grounding is None else normal(grounding.phrase_dim),
    )
    return views, states


class Laps:
    """Seconds of one thing after the other, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has ended now; the next begins."""
        now = time.perf_counter()
        self.seconds[f"{name} s"], self._start = round(now - self._start, 2), now


def two_steps(
    laps: Laps, plain: Any, applied: Any, maps: Any, noise: Tensor, words: Any, **settings: Any
) -> dict[str, Any]:
    """Two steps of a plain model and of an applied one, whose runs ``maps`` has, and how they
    compare. ``settings`` of the host's sampling: cfg, scheduler."""
    latent, drawn = torch.zeros_like(noise), list[Tensor]()
    for name, model in (("plain", plain), ("two subjects", applied)):
        drawn.append(
            host("comfy.sample").sample(
                model, noise, 2, sampler_name="euler", positive=words, negative=words,
                latent_image=latent, disable_pbar=True, **settings,
            )
        )  # fmt: skip
        laps.lap(f"two steps, {name},")
    one, other = drawn
    return {
        **laps.seconds,
        "finite": bool(other.isfinite().all()),
        "differs from plain": round(float((other - one).norm() / one.norm()), 4),
        "shares": [round(share, 3) for share in maps.find(other).record.shares(0)],
    }


class FixedRoutes:
    """The router does all its work; then its answer gives way to regions of known sizes.

    Regions are stripes, column by column; the last candidate is the background.
    """

    def __init__(self, router: Any) -> None:
        self.router = router
        self.candidates, self.pictures = router.candidates, router.pictures
        self.ready: dict[tuple[int, int], Tensor] = {}

    def fixed(self, grid: tuple[int, int]) -> Tensor:
        """One-hot maps (1,C,Q)."""
        if grid not in self.ready:
            rows, columns = grid
            count = rows * columns
            edges = [0.0, BACKGROUND]
            subjects = self.candidates - 1
            edges += [BACKGROUND + (1 - BACKGROUND) * (i + 1) / subjects for i in range(subjects)]
            rank = torch.arange(count).reshape(columns, rows).T.flatten()
            maps = torch.zeros(1, self.candidates, count)
            for place in range(self.candidates):
                inside = (rank >= round(edges[place] * count)) & (
                    rank < round(edges[place + 1] * count)
                )
                maps[0, place - 1] = inside.float()
            self.ready[grid] = maps
        return self.ready[grid]

    def maps(self, site: Any, z: Tensor, grid: Any, crops: Any) -> Any:
        soft = self.router.maps(site, z, grid, crops)
        fixed = self.fixed(grid).to(z.device)
        return dataclasses.replace(soft, maps=fixed.expand(z.shape[0], -1, -1))

    def resize(self, soft: Any, grid: Any, crops: Any) -> Any:
        resized = self.router.resize(soft, grid, crops)
        fixed = self.fixed(grid).to(resized.maps.device)
        return dataclasses.replace(resized, maps=fixed.expand_as(resized.maps))


@dataclasses.dataclass
class Bench:
    """A U-Net, AnyStory weights and subjects, and ways to run steps with them."""

    unet: Any
    anystory: Any
    subjects: list[Any]
    prepared: dict[int, Any] = dataclasses.field(default_factory=dict)  # N -> RunState
    # Processor time of every start of a run: N -> its list
    seconds: dict[int, list[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def full_size(cls, subjects: int, dtype: torch.dtype = DTYPE, *, filled: bool = True) -> Bench:
        """SDXL. Counts need no values: weights that are not ``filled`` take no time and no
        memory before somebody reads them."""
        config = core("bases.sdxl.config").AnyStoryConfig.sdxl()
        return cls(
            make_unet(config, dtype, filled=filled),
            make_anystory(config, dtype=dtype, filled=filled),
            [make_subject(config, i).map(lambda x: x.to(dtype)) for i in range(subjects)],
        )

    def patched(
        self,
        count: int,
        *,
        fixed: bool = True,
        preparing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> Any:
        """The model with the pack's wrapper for the first ``count`` subjects. A run is prepared
        inside ``preparing``, for counts that need no values."""
        wrappers, sockets = host("nodes.host.wrapper"), host("nodes.host.sockets")
        bench = self

        class Wrapper(wrappers.SamplingWrapper):
            def _prepare(self, *args: Any) -> Any:
                start = time.process_time()
                with preparing():
                    passes = super()._prepare(*args)
                bench.seconds.setdefault(count, []).append(time.process_time() - start)
                if fixed:
                    source = FixedRoutes(passes.prepared.source)
                    passes.prepared = dataclasses.replace(passes.prepared, source=source)
                bench.prepared[count] = passes.prepared
                return passes

        routing = sockets.Routing(
            self.anystory, tuple(self.subjects[:count]), (None,) * count, "learned"
        )
        settings = core("injection.prepare").Settings()
        base = host("nodes.bases").base_of(self.anystory)
        handover = host("nodes.host.handover").Handover()
        wrapper = Wrapper(base, routing, settings, 0.0, 1.0, sockets.RoutingMaps(), handover)
        extension = host("comfy.patcher_extension")
        clone = self.unet.clone()
        handover.attach(clone)
        clone.add_wrapper_with_key(extension.WrappersMP.OUTER_SAMPLE, "bench", wrapper)
        return clone

    def with_steps(
        self,
        models: dict[str, Any],
        size: tuple[int, int],
        use: Callable[[dict[str, Step]], None],
        steps: dict[str, Step] | None = None,
    ) -> None:
        """Start a run of every model at (width, height) pixels and call ``use`` inside all."""
        steps = {} if steps is None else steps
        if len(steps) == len(models):
            with torch.no_grad():
                use(steps)
            return
        name = list(models)[len(steps)]

        def inside() -> None:
            self.with_steps(models, size, use, steps)

        self._enter(models[name], size, steps, name, inside)

    def _enter(
        self,
        model: Any,
        size: tuple[int, int],
        steps: dict[str, Step],
        name: str,
        inside: Callable[[], None],
    ) -> None:
        class Sampler:
            """Makes the step, goes on to the next run, and ends with the noise."""

            def sample(
                self, wrapped: Any, sigmas: Tensor, extra: Any, callback: Any, noise: Tensor,
                latent: Any = None, mask: Any = None, disable_pbar: bool = False,
            ) -> Tensor:  # fmt: skip
                sigma = sigmas[:1]
                steps[name] = lambda: wrapped(noise * sigma, sigma, **extra)
                inside()
                return noise

        config = self.anystory.model.config.unet
        make = torch.Generator().manual_seed(5)

        def words() -> list[Any]:
            states = torch.randn(1, 77, config.context_dim, generator=make)
            pooled = torch.randn(1, config.adm_channels - 6 * 256, generator=make)
            return [[states, {"pooled_output": pooled}]]

        noise = torch.randn(1, config.in_channels, size[1] // 8, size[0] // 8, generator=make)
        guider = host("comfy.samplers").CFGGuider(model)
        guider.set_conds(words(), words())
        guider.set_cfg(7.0)
        sigmas = torch.tensor([7.0, 0.0])
        with torch.no_grad():
            guider.sample(noise, torch.zeros_like(noise), Sampler(), sigmas, disable_pbar=True)
