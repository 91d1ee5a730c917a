"""``pip install .`` takes along all of the core and the files that it reads, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = """
from setuptools import Distribution
project = Distribution({"script_name": "setup.py"})
project.parse_config_files()
command = project.get_command_obj("build_py")
command.ensure_finalized()
print("\\n".join(command.get_outputs(include_bytecode=False)))
"""


def test_the_package_holds_the_core_and_its_files() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = {str(Path(line).relative_to("build/lib")) for line in done.stdout.splitlines()}
    core = ROOT / "anystory_core"
    wanted = {
        str(path.relative_to(ROOT))
        for path in core.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == wanted
    assert "anystory_core/training/configs/paper_subject.toml" in found
