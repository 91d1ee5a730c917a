"""Bundled graphs, run in a host; and the pictures of them that the template browser shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import environment
from .client import Client
from .environment import ROOT, STATE, SetupError, say
from .host import running

FOLDER = ROOT / "workflows"
INPUTS = FOLDER / "inputs"
_HEIGHT, _QUALITY = 256, 88
_BESIDE = 4  # pictures of one graph; more of them would be too small to see


def names() -> list[str]:
    """Graphs that the mini model draws; those for SDXL need files that the pack does not hold."""
    return sorted(p.stem for p in (FOLDER / "api").glob("*.json") if not p.stem.endswith("_sdxl"))


def run_graph(
    client: Client,
    name: str,
    out: Path,
    *,
    seed: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Path], list[str]]:
    """Queue a graph and write its pictures to ``out``: (their files, in the order of the nodes,
    texts that nodes show). SetupError for an unknown name, PromptError when the host refuses."""
    if name not in names():
        raise SetupError(f"graph: got {name!r}, expected one of {names()}")
    prompt: dict[str, Any] = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    for node in prompt.values():
        inputs = node["inputs"]
        if seed is not None and "seed" in inputs:
            inputs["seed"] = seed
        if node["class_type"] == "LoadImage":
            inputs["image"] = client.upload(INPUTS / inputs["image"])
    outputs = client.queue(prompt, progress)
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    texts: list[str] = []
    for number in sorted(outputs, key=list(prompt).index):
        title = prompt[number]["class_type"].lower()
        for place, file in enumerate(outputs[number].get("images", ())):
            target = out / f"{title}_{number}_{place}.png"
            target.write_bytes(client.fetch(file))
            files.append(target)
        texts += outputs[number].get("text", ())
    return files, texts


def join(files: list[Path], target: Path) -> None:
    """Pictures side by side, at one height, as a JPEG."""
    from PIL import Image

    strip: list[Any] = []
    for file in files[:_BESIDE]:
        picture = Image.open(file).convert("RGB")
        size = (round(picture.width * _HEIGHT / picture.height), _HEIGHT)
        strip.append(picture.resize(size, Image.Resampling.LANCZOS))
    whole = Image.new("RGB", (sum(p.width for p in strip), _HEIGHT))
    left = 0
    for picture in strip:
        whole.paste(picture, (left, 0))
        left += picture.width
    whole.save(target, quality=_QUALITY)


def main() -> None:
    """Draw every graph of the mini model again: ``workflows/NAME.jpg``."""
    host = environment.prepare_host()
    with running(host, Path(sys.executable), STATE / "base") as process:
        for name in names():
            files, _ = run_graph(Client(process.url), name, STATE / "pictures" / name)
            join(files, FOLDER / f"{name}.jpg")
            say(f"wrote workflows/{name}.jpg from {len(files)} pictures")


if __name__ == "__main__":
    main()
