"""On a Ray of two workers, one of which is killed while it works."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import slow_items

from anystory_core.data.index import Index
from devkit.host import signal_group


@pytest.fixture
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(slow_items.ROOT), str(Path(slow_items.__file__).parent)])
    # Its socket's path may not be longer than 107 letters, which pytest's folders exceed.
    folder = tmp_path_factory.mktemp("r")
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_TMPDIR": str(folder)}
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus", "2",
            "--node-ip-address", "127.0.0.1", "--port", str(port), "--include-dashboard", "false",
            "--disable-usage-stats", "--block", "--temp-dir", str(folder),
            "--object-store-memory", "100000000",
        ],
        env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        assert process.stdout is not None
        while "Ray runtime started" not in process.stdout.readline():
            assert process.poll() is None and time.monotonic() < deadline
        yield f"127.0.0.1:{port}"
    finally:
        # A Ray that is asked to end waits half a minute for its raylet.
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        signal_group(process, signal.SIGKILL)
        process.communicate(timeout=60)


def test_a_worker_that_is_killed(tmp_path: Path, ray_address: str) -> None:
    out = tmp_path / "out"
    process = slow_items.start(out, "--ray", ray_address, "--seconds", 0.5)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.numbers.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    working = [p for p in psutil.process_iter(["cmdline"]) if _works(p, ray_address)]
    killed = [p.pid for p in working][:1]
    assert killed, [p.info for p in psutil.process_iter(["cmdline"])]
    os.kill(killed[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert "24 samples" in said
    entries = list(Index.of([str(out)]))
    assert [entry.name for entry in entries] == [f"{i:04d}" for i in range(24)]
    pids = {int(entry.files["pid.txt"].read()) for entry in entries}
    assert len(pids) >= 2 and len(list(out.glob("*.tar"))) == 6


def _works(process: psutil.Process, address: str) -> bool:
    """Whether it is a worker of our Ray that has converted or is about to."""
    try:
        title = " ".join(process.cmdline())
        return "_Work" in title and any(
            address in part or address.split(":")[1] in part
            for ancestor in process.parents()
            for part in ancestor.cmdline()
        )
    except psutil.Error:
        return False
