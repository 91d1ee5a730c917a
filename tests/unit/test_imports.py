"""The core stands alone; the tree keeps its rules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "anystory_core"
HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server")
# What the pack needs at run time: torch and what the host ships. The rest is for training.
TRAINING = ("diffusers", "accelerate", "webdataset", "open_clip", "tensorboard", "transformers")
PYTHON = [p for p in ROOT.rglob("*.py") if not {".dev", ".git"} & set(p.relative_to(ROOT).parts)]
LONGEST = 350  # lines


def imported(path: Path) -> set[str]:
    """Top-level names of all absolute imports of a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda p: str(p.relative_to(CORE)))
def test_the_core_never_names_a_host(path: Path) -> None:
    assert not imported(path) & set(HOST_MODULES)


def test_the_core_imports_with_hosts_and_trainers_blocked() -> None:
    """All that a host loads: every module but those of training and its data."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(CORE.rglob("*.py"))
        if not {"training", "data"} & set(path.relative_to(CORE).parts)
    ]
    assert {"anystory_core.injection.call", "anystory_core.mini.weights"} <= set(names)
    script = (
        "import importlib, sys\n"
        f"for name in {HOST_MODULES + TRAINING!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "loaded = {n for n in sys.modules if n.startswith(('anystory_core.training', "
        "'anystory_core.data', 'lab'))}\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_packs_requirements_are_the_hosts() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line.split("#")[0].strip() for line in lines} - {""}
    assert wanted <= {"safetensors", "Pillow", "kornia", "numpy"}


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST
