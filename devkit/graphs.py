"""Bundled graphs, run in a host; and the pictures of them that the template browser shows."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .client import Client
from .environment import ROOT, STATE, SetupError

FOLDER = ROOT / "workflows"
INPUTS = FOLDER / "inputs"
# Output of the loaders of a graph for real weights -> output of LoadAnyStoryMini, which gives all.
LOADERS = {
    ("CheckpointLoaderSimple", 0): 0,
    ("CheckpointLoaderSimple", 1): 1,
    ("CheckpointLoaderSimple", 2): 2,
    ("UNETLoader", 0): 0,
    ("DualCLIPLoader", 0): 1,
    ("VAELoader", 0): 2,
    ("CLIPVisionLoader", 0): 3,
    ("LoadAnyStory", 0): 4,
}
LARGE = ("_sdxl", "_flux")  # ends of the names of graphs for real weights
MINI_SIDE = 320
# By timesteps. By noise levels (karras) most steps of its schedule, which ends in noise alone, show
# nothing else.
MINI_SCHEDULER = "normal"
_SIDE, _INPUT, _MARGIN, _QUALITY = 512, 150, 8, 88  # of a template's picture, in pixels
_SHOWN = ("saveimage", "previewimage", "routingmappreview")  # what a graph is for, in this order
_BESIDE = 4  # drawn pictures that are shown; more of them would be too small to see

Prompt = dict[str, Any]


def names(*, large: bool = False) -> list[str]:
    """Graphs that the mini model draws as they are; with ``large`` also those for SDXL and FLUX,
    which need files that the pack does not hold."""
    found = sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
    return [name for name in found if large or not name.endswith(LARGE)]


def read_graph(name: str) -> Prompt:
    """A graph for the queue, as saved. SetupError for an unknown name."""
    if name not in names(large=True):
        raise SetupError(f"graph: got {name!r}, expected one of {names(large=True)}")
    return json.loads((FOLDER / "api" / f"{name}.json").read_text())


def inputs_of(prompt: Prompt, kind: str) -> list[dict[str, Any]]:
    """Inputs of all nodes of a kind."""
    return [node["inputs"] for node in prompt.values() if node["class_type"] == kind]


def with_loader(prompt: Prompt, kind: str = "LoadAnyStoryMini") -> Prompt:
    """A graph for real weights with one loader, of the mini model or of a node with the same
    outputs, in place of its own."""
    prompt = copy.deepcopy(prompt)
    kinds = {number: node["class_type"] for number, node in prompt.items()}
    loaders = {kind for kind, _ in LOADERS}
    prompt = {n: node for n, node in prompt.items() if node["class_type"] not in loaders}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and (kinds[value[0]], value[1]) in LOADERS:
                node["inputs"][name] = ["mini", LOADERS[kinds[value[0]], value[1]]]
    return {**prompt, "mini": {"class_type": kind, "inputs": {}}}


def run_graph(
    client: Client,
    prompt: Prompt,
    out: Path,
    *,
    seed: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Path], list[str]]:
    """Queue a graph and write its pictures to ``out``: (their files, in the order of the nodes and
    named by them, texts that nodes show). PromptError when the host refuses."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        if seed is not None and isinstance(inputs.get("seed"), int):  # others are another node's
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


def join(given: Sequence[Path], drawn: Sequence[Path], target: Path) -> None:
    """A square JPEG: pictures that the graph was given in a row, below them those that it drew."""
    from PIL import Image

    def read(file: Path, width: int) -> Any:
        picture = Image.open(file).convert("RGBA")
        size = (width, round(picture.height * width / picture.width))
        return picture.resize(size, Image.Resampling.LANCZOS)

    shown = drawn[:_BESIDE]
    down = -(-len(shown) // 2)
    side = min((_SIDE - 3 * _MARGIN) // 2, (_SIDE - _INPUT - 2 * _MARGIN) // down - _MARGIN)
    rows = [[read(file, _INPUT) for file in given]]
    rows += [[read(file, side) for file in shown[i : i + 2]] for i in range(0, len(shown), 2)]
    heights = [max(picture.height for picture in row) for row in rows]
    whole = Image.new("RGB", (_SIDE, _SIDE), "white")
    top = (_SIDE - sum(heights) - _MARGIN * (len(rows) - 1)) // 2
    for row, height in zip(rows, heights, strict=True):
        left = (_SIDE - sum(picture.width + _MARGIN for picture in row) + _MARGIN) // 2
        for picture in row:
            whole.paste(picture, (left, top), picture)
            left += picture.width + _MARGIN
        top += height + _MARGIN
    whole.save(target, quality=_QUALITY)


def shown_of(files: Sequence[Path]) -> list[Path]:
    """Of a graph's pictures those that say what it is for: what it saved or previewed, and the
    routes drawn over the picture, which the preview gives last."""
    kinds = {kind: [f for f in files if f.name.startswith(kind)] for kind in _SHOWN}
    return [*kinds["saveimage"], *kinds["previewimage"], *kinds["routingmappreview"][-1:]]


def draw_template(client: Client, name: str) -> tuple[list[Path], list[Path]]:
    """(pictures that a graph was given, those that it drew) for :func:`join`. Graphs for SDXL are
    drawn with the mini model, as their notes say; for FLUX, whose other settings the mini model has
    no use for, the mini graph of the same name is."""
    prompt = read_graph(name.removesuffix("_flux"))
    if name.endswith("_sdxl"):
        prompt = with_loader(prompt)
        for inputs in inputs_of(prompt, "EmptyLatentImage"):
            inputs["width"] = inputs["height"] = MINI_SIDE
        for inputs in inputs_of(prompt, "KSampler"):
            inputs["scheduler"] = MINI_SCHEDULER
    files, _ = run_graph(client, prompt, STATE / "pictures" / name)
    return [INPUTS / inputs["image"] for inputs in inputs_of(prompt, "LoadImage")], shown_of(files)


def main() -> None:
    """Write the pictures of templates, ``workflows/NAME.jpg``. Standard input: JSON, NAME -> what
    :func:`draw_template` gave. A process of its own, because only its interpreter knows Pillow."""
    for name, (given, drawn) in json.load(sys.stdin).items():
        join([Path(file) for file in given], [Path(file) for file in drawn], FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
