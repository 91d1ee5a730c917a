"""Helpers of the tests of data, which take the training tests' toy base and world along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(Path(__file__).parent), str(ROOT / "tests" / "training")]

from anystory_core.data.__main__ import main


class Commands:
    """The command line, in this process or in one of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> str:
        """Run a command that must succeed, in one process; what it printed."""
        code, out, error = self.ended(*arguments)
        assert code == 0, error or out
        return out

    def ended(self, *arguments: object) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        code = main([str(a) for a in arguments])
        said = self.capsys.readouterr()
        return code, said.out, said.err

    @staticmethod
    def apart(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        """Start it as a user does."""
        command = [sys.executable, "-m", "anystory_core.data", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


@pytest.fixture
def data(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)
