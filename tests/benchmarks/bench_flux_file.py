"""The authors' file for FLUX at its real shapes, of random numbers: converted, loaded, used.

    python3 dev.py bench flux-file --folder /tmp

Writes 2.2 GB of inputs and 2.2 GB of output into a temporary folder inside ``--folder`` and removes
it. The conversion runs in a process of its own, whose memory is read from the system: "anonymous"
is what it holds itself, "all" also counts pages of the mapped inputs. Then the file is loaded, two
subjects are encoded from random states, and the host's own Flux of real width, with one double and
one single block, draws two steps at 512x512 through the nodes: about 6 GB of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_convert import measured

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tests" / "unit")]

import flux_release  # noqa: E402

from anystory_core.bases.flux.config import FluxConfig  # noqa: E402

SIDE = 512


def convert(folder: Path) -> dict[str, Any]:
    """Run the command line and measure it."""
    names = ("anystory_flux.bin", "flux1-redux-dev.safetensors", "out.safetensors")
    command = [sys.executable, "-m", "anystory_core.convert", "flux"]
    return measured([*command, *(str(folder / n) for n in names)], folder / "out.safetensors")


def shallow(model: Any, core: Any, operations: Any) -> Any:
    """A model of one double and one single block with the weights of the first of each kind."""
    config = model.config
    doubles = config.transformer.double_blocks
    sizes = dataclasses.replace(config.transformer, double_blocks=1, single_blocks=1)
    small = core("bases.flux.model").build_model(
        dataclasses.replace(config, transformer=sizes), operations=operations, device="meta"
    )
    whole = model.state_dict()
    for prefix, module in small.modules():
        state = {}
        for name in module.state_dict():
            deep = name
            if prefix == "branches.maps" and name.startswith("2."):
                deep = f"{doubles + 1}.{name.removeprefix('2.')}"
            state[name] = whole[f"{prefix}.{deep}"]
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
    small.fingerprint = model.fingerprint
    return small


def flux(host: Any) -> Any:
    """A ModelPatcher of the host's Flux at its real width, with one block of each kind."""
    config = host("comfy.supported_models").Flux(
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
        }
    )
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({}, "")
    for p in model.diffusion_model.parameters():
        p.data.normal_(std=0.02) if p.ndim > 1 else p.data.fill_(0.5)
    management = host("comfy.model_management")
    return host("comfy.model_patcher").ModelPatcher(
        model, management.get_torch_device(), management.unet_offload_device()
    )


def one_step(folder: Path) -> dict[str, Any]:
    """Load the file, encode two subjects, and draw with them and without."""
    from speed.setting import Laps, core, host, start_host, two_steps

    start_host("use_pytorch_cross_attention")  # the sub-quadratic way takes minutes in bfloat16
    managed = host("nodes.host.managed")
    router, apply = host("nodes.route").SubjectRouter, host("nodes.apply").ApplyAnyStory
    laps = Laps()
    with torch.inference_mode():
        model = core("weights.flux").load_flux_model(
            folder / "out.safetensors", operations=managed.OPERATIONS
        )
        laps.lap("load")
        anystory = managed.ManagedAnyStory(shallow(model, core, managed.OPERATIONS), "random")
        encoding = core("subject.flux")
        subjects = []
        for label in ("one", "two"):
            mask = torch.zeros(1, 256, 256)
            mask[:, :, :128] = 1
            seen = encoding.prepare_flux_views(torch.rand(1, 256, 256, 3), mask, model.config)
            subjects.append(
                encoding.encode_flux_subject(
                    anystory.model,
                    seen,
                    states=torch.randn(1, 729, 1152).bfloat16(),
                    latents=torch.randn(1, 16, 64, 64),
                    label=label,
                )
            )
        del model
        laps.lap("encode")
        patcher = flux(host)
        routing = router.execute(
            anystory=anystory, mode="learned", subject_1=subjects[0], subject_2=subjects[1]
        ).args[0]
        applied, maps = apply.execute(
            patcher, routing, concept_start=0.0, concept_end=1.0, reference_start=0.0
        ).args
        extra = {"pooled_output": torch.randn(1, 768), "guidance": 3.5}
        positive = [[torch.randn(1, 512, 4096), extra]]
        shape = 1, 16, SIDE // 8, SIDE // 8
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        laps.lap("model")
        return two_steps(laps, patcher, applied, maps, noise, positive, cfg=1.0, scheduler="simple")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        torch.manual_seed(0)
        files = flux_release.write(folder, FluxConfig(), bias=True, dtype=torch.bfloat16)
        print(json.dumps({path.name: path.stat().st_size for path in files}), flush=True)
        print(json.dumps(convert(folder)), flush=True)
        print(json.dumps(one_step(folder)), flush=True)


if __name__ == "__main__":
    main()
