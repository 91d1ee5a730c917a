"""SDXL's widths in both hosts: `python3 dev.py bench two-hosts`.

One forward pass of diffusers' U-Net and of ComfyUI's in float32, on the same random weights (they
share the memory), with and without subjects. Prints the relative difference; exit code 1 above
1e-4. Needs about 16 GiB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import diffusers
import torch
from speed import setting
from speed.setting import core, host

LIMIT = 1e-4
SIDE = 32  # of the latent
ROWS = 2  # one conditional, one unconditional


def twin_of(patcher: Any, config: Any) -> Any:
    """diffusers' U-Net around the tensors of the host's."""
    sizes = core("training.hosts.sizes")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**sizes.diffusers_unet_config(config.unet))
    table = core("bases.sdxl.names").ldm_to_diffusers(config)
    state = patcher.model.diffusion_model.state_dict()
    renamed = {table[name]: tensor for name, tensor in state.items()}
    unet.load_state_dict(renamed, strict=True, assign=True)
    return unet.eval().requires_grad_(False)


def main() -> None:
    """Compare at N = 0, 1 and 3."""
    torch.set_grad_enabled(False)
    setting.start_host()
    config = core("bases.sdxl.config").AnyStoryConfig.sdxl()
    patcher = setting.make_unet(config, torch.float32)
    anystory = setting.make_anystory(config, dtype=torch.float32)
    model, hosts = anystory.model, core("training.hosts.unet")
    twin = twin_of(patcher, config)
    slot = hosts.install(twin, model.sites)
    make = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    latents, text = draw(ROWS, 4, SIDE, SIDE), draw(ROWS, 77, config.unet.context_dim)
    pooled = draw(ROWS, config.unet.adm_channels - 6 * 256)
    timesteps, ids = torch.tensor([500.0] * ROWS), hosts.time_ids(256, 256, ROWS, latents.device)
    embed = host("comfy.ldm.modules.diffusionmodules.util").timestep_embedding
    label = torch.cat([pooled, *(embed(ids[:, i], 256) for i in range(6))], dim=1)
    calls, prepare = core("injection.call"), core("injection.prepare")
    modes, row_roles = core("routing.modes"), core("injection.rows")
    ids_module, patches = host("nodes.host.ids"), host("nodes.host.sdxl.patcher")
    subjects = [setting.make_subject(config, n).map(lambda x: x.float()) for n in range(3)]

    def call(count: int, attention: Any) -> Any:
        if not count:
            return None
        chosen = subjects[:count]
        source = modes.build_source("learned", model, chosen, [None] * count)
        prepared = prepare.prepare_subjects(model, chosen, source, prepare.Settings())
        rows = row_roles.Rows((0,), (1,))
        return calls.Call(prepared, rows, (True,) * count, model.sites, attention)

    figures: dict[str, float] = {}
    plain = None
    for count in (0, 1, 3):
        inputs = hosts.UNetInputs(latents, timesteps, text, pooled, ids)
        ours = hosts.predict(twin, slot, call(count, hosts.dense_attention), inputs)
        table = patches.BlockTable(model.sites)
        options = patches.installed({}, table, patcher.model.diffusion_model, late=False)
        options[ids_module.CALL_KEY] = call(count, patches.RoutedAttention(options))
        theirs = patcher.model.diffusion_model(
            latents, timesteps, context=text, y=label, transformer_options=options
        )
        figures[f"N = {count}"] = float((ours - theirs).norm() / theirs.norm())
        plain = ours if plain is None else plain
        if count:
            figures[f"N = {count}, change by the subjects"] = float(
                (ours - plain).norm() / plain.norm()
            )
    print(json.dumps(figures, indent=2))
    if max(value for name, value in figures.items() if "change" not in name) > LIMIT:
        raise SystemExit(f"the hosts differ by more than {LIMIT}")


if __name__ == "__main__":
    main()
