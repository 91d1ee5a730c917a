"""The viewer of the routes as tests see it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from editor import Editor
from PIL import Image
from selenium.webdriver.common.by import By

VIEWER = ".anystory-viewer"
PREVIEW = "RoutingMapPreview"


def element(editor: Editor, selector: str) -> Any:
    """One element of the viewer."""
    return editor.driver.find_element(By.CSS_SELECTOR, f"{VIEWER} {selector}")


def drawn(editor: Editor) -> str:
    """The viewer's canvas as a file."""
    return editor.js("return document.querySelector(arguments[0]).toDataURL()", f"{VIEWER} canvas")


def run_two_subjects(editor: Editor) -> dict[str, Any]:
    """Queue the two-subject graph; the preview's outputs, once the picture and the viewer are
    there."""
    editor.template("two_subjects")
    outputs = editor.queue()
    editor.shows_picture("SaveImage", 128)
    editor.wait("return document.querySelector(arguments[0])?.checkVisibility()", VIEWER)
    editor.look_at(PREVIEW)
    editor.wait("return document.querySelector(arguments[0])", f"{VIEWER} fieldset input")
    (shown,) = [out for out in outputs.values() if "anystory_routes" in out]
    assert len(shown["images"]) == 2
    return shown


def recorded(editor: Editor, entry: dict[str, Any]) -> list[dict[int, np.ndarray]]:
    """Region ids by step and block, from the atlas file."""
    layout = entry["layout"]
    picture = Image.open(io.BytesIO(editor.client.fetch(entry["file"]))).convert("L")
    ids = np.round(np.array(picture).reshape(-1) / layout["level"]).astype(int)
    place, steps = 0, []
    for step in layout["steps"]:
        blocks = {}
        for block, height, width in layout["grids"][step["grid"]]:
            blocks[block] = ids[place : place + height * width].reshape(height, width)
            place += height * width
        steps.append(blocks)
    return steps
