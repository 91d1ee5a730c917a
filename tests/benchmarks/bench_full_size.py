"""SDXL at full size, everything in memory: `python3 dev.py bench full-size`.

Random weights in bfloat16 on the CPU: the U-Net, and all of AnyStory's parts. Two subjects are
encoded (ReferenceNet included), then steps of a real sampling run at 512x512 with guidance are
taken in turn with the unpatched model's. Prints seconds, ratio and the peak of resident memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from speed import setting, times
from speed.setting import core

LIMIT = 20  # GiB
STEPS = 2


def encode(anystory: Any, number: int) -> Any:
    """A subject from a random picture."""
    views, states = setting.random_picture(anystory.model.config, number)
    encode_subject = core("subject.encoder").encode_subject
    return encode_subject(anystory.model, views, states, label=f"subject {number}")


def main() -> None:
    """Run it; exit code 1 above the limit."""
    torch.set_grad_enabled(False)
    setting.start_host()
    config = core("bases.sdxl.config").AnyStoryConfig.sdxl()
    anystory = setting.make_anystory(config, tuple(core("weights.model").PARTS))
    start = time.perf_counter()
    subjects = [encode(anystory, number) for number in range(2)]
    encoding = (time.perf_counter() - start) / 2
    bench = setting.Bench(setting.make_unet(config), anystory, subjects)
    models = {"plain": bench.unet.clone(), "2": bench.patched(2, fixed=False)}
    figures: dict[str, Any] = {"encoding a picture, s": round(encoding, 2)}

    def use(steps: dict[str, Any]) -> None:
        figures.update(times.summary(times.interleave(steps, STEPS), "plain"))

    bench.with_steps(models, (512, 512), use)
    figures["start of a run, cpu s"] = round(min(bench.seconds[2]), 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures["peak resident memory, GiB"] = round(peak, 2)
    print(json.dumps(figures, indent=2))
    if peak > LIMIT:
        raise SystemExit(f"resident memory: {peak:.1f} GiB, at most {LIMIT}")


if __name__ == "__main__":
    main()
