"""What a user waits for once: loading a weights file, and encoding a subject."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .setting import DTYPE, ROOT, core, host, make_anystory, random_picture
from .times import interleave, summary

BLOCK = 16 * 2**20

# Each in a process of its own, which says what it took and what it held at most above its start.
_MEASURED = """
import json, sys, time
sys.path[:0] = {paths!r}
def resident(line):
    for row in open("/proc/self/status"):
        if row.startswith(line):
            return int(row.split()[1]) / 2**20
{prepare}
before, start = resident("VmRSS"), time.perf_counter()
{measure}
seconds = time.perf_counter() - start
print(json.dumps({{"s": seconds, "resident, GiB": resident("VmHWM") - before}}))
"""
PLAIN = """
import os
held = bytearray(os.path.getsize(sys.argv[1]))
view, at = memoryview(held), 0
with open(sys.argv[1], "rb", buffering=0) as file:
    while read := file.readinto(view[at:at + {block}]):
        at += read
"""
OURS_READY = """
from speed import setting
setting.start_host()
bases, managed = setting.host("nodes.bases"), setting.host("nodes.host.managed")
"""
OURS = "held = managed.ManagedAnyStory(bases.load_weights(sys.argv[1]), 'random')"


def load(repetitions: int) -> dict[str, Any]:
    """Load AnyStory of a file with every part at SDXL's sizes in half precision, and a plain read
    of its bytes into memory, in turn; the file is in the system's cache for both."""
    model = make_anystory(
        core("bases.sdxl.config").AnyStoryConfig.sdxl(), tuple(core("weights.model").PARTS)
    ).model
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "anystory.safetensors"
        core("weights.checkpoint").save_model(file, model, model.config)
        del model
        paths = [str(ROOT / "tests" / "benchmarks")]
        scripts = {
            "plain read": _MEASURED.format(
                paths=paths, prepare="", measure=PLAIN.format(block=BLOCK)
            ),
            "Load AnyStory": _MEASURED.format(paths=paths, prepare=OURS_READY, measure=OURS),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in scripts}
        for number in range(repetitions + 1):
            for name, script in scripts.items():
                done = subprocess.run(
                    [sys.executable, "-c", script, str(file)],
                    check=True, capture_output=True, text=True, env=os.environ,
                )  # fmt: skip
                if number:  # the first round warms the system's cache
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
        size = file.stat().st_size
    table: dict[str, Any] = {"repetitions": repetitions, "file, GiB": size / 2**30}
    for name, rows in found.items():
        table[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    table["Load AnyStory / plain read"] = table["Load AnyStory"]["s"] / table["plain read"]["s"]
    return table


def encode(repetitions: int) -> dict[str, Any]:
    """All that AnyStory's own networks do for one picture, through the host's glue, and one pass of
    the ReferenceNet alone, in turn. The states of CLIP and of the VAE are random."""
    config = core("bases.sdxl.config").AnyStoryConfig.sdxl()
    anystory = make_anystory(config, ("subject_encoder", "routing_encoder", "reference_net"))
    views, states = random_picture(config, 6)
    grid = states.latents.shape[-2:]
    inside = core("subject.preprocess").latent_mask(views.mask, tuple(grid)).to(DTYPE)
    net = anystory.model.reference_net
    whole = host("nodes.host.sdxl.encode")._encode
    steps = {
        "ReferenceNet": lambda: net(torch.cat((states.latents, inside), dim=1)),
        "encode": lambda: whole(anystory, views, states, "subject"),
    }
    with torch.inference_mode():
        return summary(interleave(steps, repetitions), "ReferenceNet")
