"""The paper's Table 1: parameters and operations of the ReferenceNet, on the meta device."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils.flop_counter import FlopCounterMode

from anystory_core.bases.sdxl.config import AnyStoryConfig, ReferenceConfig
from anystory_core.bases.sdxl.reference_net import ReferenceNet

LATENT = 64  # 512 x 512 pixels


def measure(config: AnyStoryConfig, *, full: bool) -> dict[str, float]:
    """Parameters and operations of one picture's pass."""
    net = ReferenceNet(config, full=full, device="meta")
    latents = torch.zeros(1, 5, LATENT, LATENT, device="meta")
    context = torch.zeros(1, 77, config.unet.context_dim, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        features = net(latents, context if config.reference.cross_attention else None)
    return {
        "parameters_billion": sum(p.numel() for p in net.parameters()) / 1e9,
        "operations_tera": counter.get_total_flops() / 1e12,
        "features": len(features),
        "feature_shapes": len({tuple(f.shape) for f in features}),
    }


def main() -> None:
    """Print the table as text, then as JSON."""
    plain = AnyStoryConfig.sdxl()
    original = dataclasses.replace(plain, reference=ReferenceConfig(cross_attention=True))
    rows = {
        "original, with cross-attention (paper: 2.57 B)": measure(original, full=True),
        "simplified, full graph (paper: 2.02 B)": measure(plain, full=True),
        "simplified, as built: nothing after the last norm1": measure(plain, full=False),
    }
    for name, row in rows.items():
        print(
            f"{name:52} {row['parameters_billion']:.4f} B  {row['operations_tera']:.3f} T "
            f"operations  {row['features']:.0f} features"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
