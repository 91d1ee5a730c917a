"""Processes that share a phase."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_SCRIPT = """
import os, sys, time
from functools import partial
from pathlib import Path
from lab.phase import run_shared

def wait(folder):
    (Path(folder) / str(os.getpid())).touch()
    for _ in range(600):
        time.sleep(0.1)

if __name__ == "__main__":
    run_shared(partial(wait, sys.argv[1]), 2)
"""


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_none_outlives_a_run_that_a_script_began_and_that_was_killed(tmp_path: Path) -> None:
    """They would write the phase's state beside the run that resumes. A background job of a script
    ignores SIGINT, and so would its processes."""
    script, notes = tmp_path / "run.py", tmp_path / "pids"
    script.write_text(_SCRIPT)
    notes.mkdir()
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, str(script), str(notes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, cwd=tmp_path, env=environment)
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 120
        while len(pids) < 2:
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
            pids = [int(note.name) for note in notes.iterdir()]
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(alive, pids))
    finally:
        parent.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
