"""A Chromium for the browser tests: Debian's own, driven without a display."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .environment import STATE, SetupError, run, say

WINDOW = (1600, 1100)
# What each program is called, most likely name first.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRIVERS = ("chromedriver", "chromium.chromedriver")


def _program(names: tuple[str, ...], what: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise SetupError(
        f"{what}: none of {', '.join(names)} is on the PATH; install a browser and its driver of "
        "the same version, on Debian and Ubuntu: apt-get install chromium chromium-driver"
    )


def programs() -> tuple[str, str]:
    """Browser and driver on this machine; SetupError names what is not installed."""
    return _program(BROWSERS, "browser"), _program(DRIVERS, "browser driver")


def prepare_front_end(version: str, interpreter: Path) -> Path:
    """Folder of the editor's files for the host's `--front-end-root`, from its Python package."""
    folder = STATE / "front_ends" / version
    if not folder.exists():
        say(f"getting the editor {version}")
        package = f"comfyui-frontend-package=={version}"
        pip = [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            made = Path(partial) / version
            run([*pip, "--quiet", "--target", str(made), package], f"installation of {package}")
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # another process was first
                    raise
    return folder / "comfyui_frontend_package" / "static"


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A headless selenium driver with a fresh profile; all console messages are kept. SetupError
    names what is not installed."""
    browser, driver = programs()
    try:
        from selenium import webdriver
    except ImportError as error:
        raise SetupError("selenium is not installed; pip install selenium") from error
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new",
        "--no-sandbox",  # CI runs as root
        "--disable-dev-shm-usage",  # /dev/shm is small in containers
        "--disable-gpu",
        "--force-device-scale-factor=1",
        "--lang=en",
        "--disable-background-networking",
        "--no-first-run",
        f"--window-size={WINDOW[0]},{WINDOW[1]}",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        session.set_script_timeout(60)
        session.set_page_load_timeout(120)
        yield session
    finally:
        session.quit()
