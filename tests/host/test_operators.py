"""What a patched block adds, counted by the benchmark that prints it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from devkit.environment import ROOT


def test_operators_of_a_block(tmp_path: Path, host_source: Path) -> None:
    """One more attention and a router, for two subjects in one masked call."""
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "dev.py"), "bench", "speed", "python", "--json", str(file)],
        env={**os.environ, "COMFYUI_PATH": str(host_source), "ANYSTORY_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())["python"]
    assert figures["plain"]["attn1"]["calls"] == figures["N = 2"]["SelfAttentionPatch"]["calls"] > 0
    assert 0 < figures["operators, added per block"] <= 32
