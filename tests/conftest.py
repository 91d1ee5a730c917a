"""How tests find the code: `anystory_core` at the top level, `lab` beside it, the whole pack as
`anystory_pack`.

The repository root stays off `sys.path`: there, our `nodes/` would hide ComfyUI's own `nodes.py`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _package(name: str, folder: Path) -> ModuleType:
    """Register a package under a name of our choice without running its __init__."""
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    return module


sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
_HELPERS = ("unit", "host", "browser")  # folders with helper modules
sys.path += [str(ROOT / "tests" / folder) for folder in _HELPERS]
_package("anystory_pack", ROOT)
_package("anystory_core", ROOT / "anystory_core")
_package("lab", ROOT / "lab")
_package("devkit", ROOT / "devkit")

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


class _PlainRoot:
    """The repository is a package to ComfyUI; pytest must not import it as one."""

    @staticmethod
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_PlainRoot())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped test is a failure: something that should be there is not."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = 1
