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
    """dev.py at the head of a group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(clone / "dev.py"), *arguments],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        preexec_fn=_hear_hang_ups,
    )  # fmt: skip


def _hear_hang_ups() -> None:
    """As under a terminal; tests started by nohup would hand on that it is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def read_until(process: subprocess.Popen[str], words: str) -> None:
    """Read what it prints, progress without line ends too, until ``words`` appear."""
    assert process.stdout is not None
    text = ""
    while words not in text:
        character = process.stdout.read(1)
        assert character, text
        text += character


def wait_for_the_host(clone: Path) -> None:
    """dev.py speaks before it starts the host, which is the clone's second process."""
    end = time.monotonic() + 60
    while len(list(of_clone(clone))) < 2:
        assert time.monotonic() < end, "no host within a minute"
        time.sleep(0.05)


def assert_all_end(process: subprocess.Popen[str], clone: Path) -> None:
    assert process.wait(timeout=60) == 130
    end = time.monotonic() + 10
    while list(of_clone(clone)) and time.monotonic() < end:
        time.sleep(0.2)
    assert list(of_clone(clone)) == []


def of_clone(clone: Path) -> Iterator[psutil.Process]:
    """Running processes that were started for the clone: they name it, or work in it."""
    for process in psutil.process_iter():
        try:
            if any(str(clone) in word for word in (process.cwd(), *process.cmdline())):
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


@pytest.fixture
def nothing_left(clone: Path) -> Iterator[None]:
    """A failed test leaves no process either."""
    yield
    for left in of_clone(clone):
        left.kill()


@pytest.mark.parametrize(
    ("command", "words", "number"),
    [
        ("serve", "Ctrl-C ends it", signal.SIGINT),
        ("serve", "Ctrl-C ends it", signal.SIGTERM),
        ("demo", "starting the host", signal.SIGHUP),
        ("demo", "KSampler: ", signal.SIGINT),
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_an_interrupt_leaves_no_process(
    clone: Path, variables: dict[str, str], command: str, words: str, number: signal.Signals
) -> None:
    process = start(clone, variables, command)
    read_until(process, words)
    wait_for_the_host(clone)
    process.send_signal(number)
    assert_all_end(process, clone)


# Starts something in a session of its own, as tests start hosts, and takes a while to stop it.
SLOW_TO_TIDY = """
import subprocess, sys, time

def test_waits():
    host = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", __file__], start_new_session=True
    )
    try:
        print("the host is up", flush=True)
        time.sleep(600)
    finally:
        time.sleep(1)
        host.kill()
        host.wait()
"""


@pytest.mark.parametrize("to", ["dev.py alone", "the terminal's whole group"])
@pytest.mark.usefixtures("nothing_left")
def test_interrupted_tests_stop_their_hosts(
    clone: Path, variables: dict[str, str], to: str
) -> None:
    """pytest is told once, and has the time to tidy."""
    folder = clone / "tests"
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "test_waits.py").write_text(SLOW_TO_TIDY)
    process = start(clone, variables, "test", "tests/test_waits.py", "-s")
    read_until(process, "the host is up")
    assert len(list(of_clone(clone))) == 3  # dev.py, pytest's test and its host
    if to == "dev.py alone":
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)
    assert_all_end(process, clone)


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_without_a_browser_its_tests_are_skipped_and_ci_fails(
    variables: dict[str, str], ci: str, code: int
) -> None:
    command = [sys.executable, "-m", "pytest", "-rs", "tests/browser", "-k", "test_editor"]
    done = subprocess.run(
        command, cwd=ROOT, env={**variables, "PATH": "/nowhere", "CI": ci}, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert "browser: none of chromium" in done.stdout and "chromium-driver" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "changed", "said"),
    [
        (["demo"], {"COMFYUI_PATH": "/nowhere"}, "COMFYUI_PATH: /nowhere has no main.py"),
        (["demo"], {"ANYSTORY_PYTHON": "/nowhere/python"}, "ANYSTORY_PYTHON: /nowhere/python"),
        (["bench", "nothing"], {}, "bench: got 'nothing', expected one of"),
        (["bench", "--help"], {}, "bench: expected one of"),
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


def test_a_benchmark_has_help_of_its_own(variables: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "dev.py"), "bench", "speed", "--help"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "--repetitions" in done.stdout


def test_a_failing_step_is_tried_three_times_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.time, "sleep", lambda _: None)
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); raise SystemExit(1)"
    with pytest.raises(environment.SetupError, match="download of a thing failed 3 times"):
        environment.run([sys.executable, "-c", code], "download of a thing")
    assert count.read_text() == "xxx"
