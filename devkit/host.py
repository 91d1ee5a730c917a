"""A ComfyUI process of our own: this pack installed, a free loopback port, no trace after."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from .environment import ROOT, SetupError, say

PACK_NAME = "comfyui-anystory"
START_SECONDS = 180
STOP_SECONDS = 15


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def install_pack(base: Path) -> None:
    """Put this repository into ``base/custom_nodes``, as a link where the system allows links."""
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    target = base / "custom_nodes" / PACK_NAME
    if target.is_symlink() and target.resolve() == ROOT:
        return
    if target.is_symlink():
        target.unlink()
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        ignore = shutil.ignore_patterns(".dev", ".git", "__pycache__", "node_modules")
        shutil.copytree(ROOT, target, dirs_exist_ok=True, ignore=ignore)


class Host:
    """A running host. ``url`` is its address, ``log`` the file of all it printed."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, base: Path, log: Path) -> None:
        self.process = process
        self.port = port
        self.base = base
        self.log = log
        self.url = f"http://127.0.0.1:{port}"

    def tail(self, lines: int = 40) -> str:
        """The end of the host's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def wait_until_ready(self) -> None:
        """Poll until the server answers; SetupError with the log's end otherwise."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise SetupError(f"the host ended with code {code}:\n{self.tail()}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as reply:
                    json.load(reply)
                return
            time.sleep(0.25)
        raise SetupError(f"the host did not answer within {START_SECONDS} s:\n{self.tail()}")

    def stop(self) -> None:
        """End the host and all it started: ask, wait, then insist."""
        if self.process.poll() is None:
            signal_group(self.process, signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                signal_group(self.process, getattr(signal, "SIGKILL", signal.SIGTERM))
                self.process.wait()


def signal_group(process: subprocess.Popen[bytes] | subprocess.Popen[str], number: int) -> None:
    """Signal a process that leads a group, and all of that group, where there are groups."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


@contextlib.contextmanager
def running(
    source: Path,
    interpreter: Path,
    base: Path,
    *,
    port: int | None = None,
    cpu: bool | None = None,
    arguments: tuple[str, ...] = (),
) -> Iterator[Host]:
    """Start the host in ``source`` with private folders in ``base``; stop it in any case."""
    install_pack(base)
    port = port or free_port()
    log = base / "host.log"
    command = [
        str(interpreter), str(source / "main.py"), "--listen", "127.0.0.1", "--port", str(port),
        "--base-directory", str(base), "--disable-auto-launch", "--disable-api-nodes",
        "--database-url", "sqlite:///:memory:", *arguments,
    ]  # fmt: skip
    if cpu if cpu is not None else not shutil.which("nvidia-smi"):
        command.append("--cpu")
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=source,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    host = Host(process, port, base, log)
    try:
        say(f"starting the host on {host.url}")
        host.wait_until_ready()
        yield host
    finally:
        host.stop()
