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
TRAINING = ("diffusers", "accelerate", "open_clip", "tensorboard", "transformers")


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


CLOSED = {("anystory_core", "training"), ("anystory_core", "data")}  # to nodes
# Folders and files of the core, each of which imports only what stands before it.
ORDER = (
    "errors", "story", "file_names", "tensor_files", "config", "bases", "subject", "routing",
    "pictures", "injection", "weights", "convert", "mini", "data", "training",
)  # fmt: skip


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Our own modules that a file imports, as paths from the repository's root."""
    inside = path.relative_to(ROOT).parts[:-1]
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            module = inside[: len(inside) - node.level + 1] + module
        found |= {module} if node.module else {(*module, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda p: str(p.relative_to(CORE)))
def test_the_core_imports_downwards(path: Path) -> None:
    own = path.relative_to(CORE).with_suffix("").parts[0]
    for module in imports_of(path):
        if module[0] == "lab":
            raise AssertionError(f"{path.name} imports {module}")
        if module[0] == "anystory_core" and own in ORDER and module[1] != own:
            assert ORDER.index(module[1]) < ORDER.index(own), module


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").rglob("*.py")), ids=lambda p: p.name)
def test_nodes_import_downwards(path: Path) -> None:
    """Nothing that a host loads imports training, its data or the lab; and what serves every base
    in ``nodes/host`` imports no single one."""
    inside = path.relative_to(ROOT).parts[:-1]
    for module in imports_of(path):
        assert module[0] != "lab" and module[:2] not in CLOSED, module
        if inside == ("nodes", "host"):
            base = module[:2] == inside and (ROOT / "nodes" / "host" / module[2]).is_dir()
            assert not base and (module[0] != "nodes" or module[1] == "host"), module


def test_the_packs_requirements_are_the_hosts() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line.split("#")[0].strip() for line in lines} - {""}
    assert wanted <= {"safetensors", "Pillow", "kornia", "numpy", "scipy"}
