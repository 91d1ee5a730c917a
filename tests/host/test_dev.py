"""dev.py as a person uses it: from a folder with spaces in its name, interrupted, misused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from devkit import environment

ROOT = environment.ROOT


@pytest.fixture(scope="module")
def variables(host_source: Path) -> dict[str, str]:
    """A host and an interpreter that are there already, so nothing is installed."""
    return {**os.environ, "COMFYUI_PATH": str(host_source), "ANYSTORY_PYTHON": sys.executable}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project under another, awkward path."""
    target = tmp_path_factory.mktemp("dev") / "my pack, a copy"
    ignore = shutil.ignore_patterns(".dev", ".git", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


def start(clone: Path, variables: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    # A shell's background jobs, and so tests run from one, ignore Ctrl-C; a person's do not.
    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, str(clone / "dev.py"), *arguments],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=heed,
    )  # fmt: skip


def of_clone(clone: Path) -> Iterator[psutil.Process]:
    """Running processes that were started for the clone."""
    for process in psutil.process_iter():
        try:
            if any(str(clone) in word for word in process.cmdline()):
                yield process
        except psutil.Error:
            continue


def test_demo_writes_its_pictures(clone: Path, variables: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "pictures of mine"
    process = start(clone, variables, "demo", "--out", str(out), "--seed", "3")
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    written = sorted(out.glob("*.png"))
    assert any(file.name.startswith("saveimage") for file in written)
    assert any(file.name.startswith("routingmappreview") for file in written)
    assert all(Image.open(file).size >= (64, 64) for file in written)
    assert "KSampler: 25/25" in text
    assert list(of_clone(clone)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process(
    clone: Path, variables: dict[str, str], number: signal.Signals
) -> None:
    process = start(clone, variables, "serve")
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "Ctrl-C ends it" in line:
                break
        assert len(list(of_clone(clone))) >= 2  # dev.py and the host
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        end = time.monotonic() + 10
        while list(of_clone(clone)) and time.monotonic() < end:
            time.sleep(0.2)
        assert list(of_clone(clone)) == []
    finally:
        for left in of_clone(clone):
            left.kill()


@pytest.mark.parametrize(
    ("arguments", "changed", "said"),
    [
        (["demo"], {"COMFYUI_PATH": "/nowhere"}, "COMFYUI_PATH: /nowhere has no main.py"),
        (["demo"], {"ANYSTORY_PYTHON": "/nowhere/python"}, "ANYSTORY_PYTHON: /nowhere/python"),
        (["bench", "nothing"], {}, "bench: got 'nothing', expected one of"),
        (["demo", "--graph", "nothing"], {}, "invalid choice: 'nothing'"),
        (["demo", "--what"], {}, "unknown arguments: --what"),
    ],
)
def test_mistakes_are_named(
    clone: Path,
    variables: dict[str, str],
    arguments: list[str],
    changed: dict[str, str],
    said: str,
) -> None:
    process = start(clone, {**variables, **changed}, *arguments)
    text, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert said in text and "Traceback" not in text


def test_a_failing_step_is_tried_three_times_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.time, "sleep", lambda _: None)
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); raise SystemExit(1)"
    with pytest.raises(environment.SetupError, match="download of a thing failed 3 times"):
        environment.run([sys.executable, "-c", code], "download of a thing")
    assert count.read_text() == "xxx"
