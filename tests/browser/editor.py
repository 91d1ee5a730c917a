"""The editor as tests use it: open, load a graph, queue, look, and complain of errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from PIL import Image
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    StaleElementReferenceException,
)
from selenium.webdriver import ActionChains

from devkit.client import Client

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
PACK = "comfyui-anystory"
FIRST_VERSION = "1.32.9"  # of the editor; what the host that the tests use asks for
NEWEST_VERSION = "1.58.1"
AROUND = 14  # pixels around a node in a picture of it
SCREENSHOTS = ROOT / ".dev" / "screenshots"

READY = (
    "return Boolean(window.app?.graph && app.canvas && app.extensionManager?.setting && "
    "window.LiteGraph?.registered_node_types?.KSampler && "
    # The editor opens a graph of its own last; one that we load before that would be replaced.
    "app.extensionManager.workflow?.activeWorkflow)"
)
# Before anything else of a page runs: it finds no tabs of the page before, which would open late.
FORGET = "if (location.protocol === 'http:') { localStorage.clear(); sessionStorage.clear(); }"
CARD = '[data-testid="template-workflow-{}"]'  # of a template in the template browser
# The first node of a type in the open graph.
NODE = "const node = app.graph._nodes.find((n) => n.type === arguments[0]);"


class Editor:
    """One browser on one host."""

    def __init__(self, driver: Any, client: Client, name: str) -> None:
        self.driver, self.client, self.name = driver, client, name
        self.vue = False  # nodes drawn by Vue
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": FORGET})

    def open(self, *, vue: bool = False, script: bool = True) -> None:
        """Load the page anew, with canvas or Vue nodes, with or without our script."""
        self.vue = vue
        self.client.post(
            "/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": vue}
        )
        blocked = [] if script else [f"*/extensions/{PACK}/*"]
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": blocked})
        self.driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": not script})
        self.driver.get("about:blank")
        self.driver.get(self.client.url)
        self.wait(READY, seconds=60)
        loaded = "return app.extensions.some((extension) => extension.name === 'AnyStory')"
        if script:
            self.wait(loaded)
        else:
            assert not self.js(loaded)
        self.js("app.canvas.read_only = false")

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a function body; what it returns."""
        return self.driver.execute_script(script, *arguments)

    def finish(self, expression: str, *arguments: Any) -> Any:
        """What a promise gives."""
        return self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"({expression}).then((value) => done([value ?? null]), (e) => done(String(e)))",
            *arguments,
        )[0]

    def wait(self, script: str, *arguments: Any, seconds: float = 30) -> Any:
        """Poll a function body until it returns something true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.js(script, *arguments)
            if value:
                return value
            time.sleep(0.1)
        self.screenshot("timeout")
        raise AssertionError(f"not true within {seconds:.0f} s: {script}")

    def load(self, graph: dict[str, Any]) -> None:
        """Open a graph."""
        # What it gives holds itself in newer editors, and so cannot come here.
        self.finish("app.loadGraphData(arguments[0]).then(() => true)", graph)

    def press(self, script: str, *arguments: Any) -> None:
        """Click the element that a function body finds, once it is there and stands still."""
        end = time.monotonic() + 30
        while True:
            try:
                return self.wait(script, *arguments).click()
            except (ElementClickInterceptedException, StaleElementReferenceException):
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def browse_templates(self) -> None:
        """Open the template browser on the pack's templates."""
        self.js("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.press(
            "return [...document.querySelectorAll('[role=dialog] *')].find((element) => "
            "!element.children.length && element.textContent.trim() === arguments[0])",
            PACK,
        )

    def load_template(self, name: str) -> None:
        """Open one of the pack's templates as a person does, in the template browser."""
        self.browse_templates()
        self.choose(name)

    def choose(self, name: str) -> None:
        """Pick a card of the open template browser, which closes it."""
        before = self.js("return app.graph.id")
        self.press("return document.querySelector(arguments[0])", CARD.format(name))
        self.wait("return app.graph.id !== arguments[0] && app.graph._nodes.length", before)
        self.wait("return !document.querySelector('[role=dialog]')")

    def template(self, name: str, *, steps: int = 3, size: int = 128) -> None:
        """Open a template's graph, made quick."""
        graph = json.loads(TEMPLATES[name].read_text())
        for node in graph["nodes"]:
            if node["type"] == "KSampler":
                node["widgets_values"][2] = steps
            elif node["type"] == "EmptyLatentImage":
                node["widgets_values"][:2] = [size, size]
        self.load(graph)

    def prompt(self) -> dict[str, Any]:
        """The API prompt of the open graph."""
        return self.finish("app.graphToPrompt().then((prompt) => prompt.output)")

    def saved(self) -> dict[str, Any]:
        """The open graph as it would be saved."""
        return json.loads(self.js("return JSON.stringify(app.graph.serialize())"))

    def inputs(self, kind: str) -> list[str]:
        """Names of a node's sockets, widgets' own sockets left out."""
        return self.js(
            NODE + "return node.inputs.filter((input) => !input.widget).map((input) => input.name)",
            kind,
        )

    def set(self, kind: str, name: str, value: Any) -> None:
        """Give a widget a value."""
        self.js(
            NODE + "node.widgets.find((w) => w.name === arguments[1]).value = arguments[2]",
            kind, name, value,
        )  # fmt: skip

    def queue(self) -> dict[str, Any]:
        """Run the open graph; the outputs of its nodes by id."""
        before = set(self.client.get("/history"))
        self.js("app.queuePrompt(0)")
        end = time.monotonic() + 120
        while time.monotonic() < end:
            for number, entry in self.client.get("/history").items():
                if number not in before:
                    assert entry["status"]["status_str"] == "success", entry["status"]
                    return entry["outputs"]
            time.sleep(0.1)
        raise AssertionError("the queue gave nothing within 120 s")

    def look_at(self, kind: str, scale: float = 1.0, left: float = 160) -> None:
        """Bring a node to the upper left of the window."""
        self.js(
            NODE + "app.canvas.ds.scale = arguments[1];"
            "app.canvas.ds.offset = [arguments[2] / arguments[1] - node.pos[0],"
            " 140 / arguments[1] - node.pos[1]]; app.canvas.setDirty(true, true)",
            kind, scale, left,
        )  # fmt: skip
        self.frames()

    def shows_picture(self, kind: str, side: int) -> None:
        """Wait until a node shows a square picture of this size."""
        self.look_at(kind)
        self.wait(
            NODE + "const drawn = document.querySelectorAll(`[data-node-id='${node.id}'] img`);"
            "return [...drawn, ...(node.imgs ?? [])].some((picture) => picture.complete &&"
            " picture.naturalWidth === arguments[1] && picture.naturalHeight === arguments[1])",
            kind, side,
        )  # fmt: skip

    def frames(self) -> None:
        """Let the page draw a few times."""
        self.finish(
            "new Promise((done) => { let n = 6; const next = () => (n-- ? "
            "requestAnimationFrame(next) : done()); next(); })"
        )

    def slot(self, kind: str, name: str, *, output: bool) -> tuple[int, int]:
        """Where a socket is in the window."""
        x, y = self.js(
            NODE + "const slots = arguments[2] ? node.outputs : node.inputs;"
            "const index = slots.findIndex((slot) => slot.name === arguments[1]);"
            # Vue draws sockets as elements.
            "const key = `${node.id}-${arguments[2] ? 'out' : 'in'}-${index}`;"
            "const dot = document.querySelector(`[data-slot-key='${key}']`);"
            "if (dot) { const box = dot.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; }"
            "const place = arguments[2] ? node.getOutputPos(index) : node.getInputPos(index);"
            "const { scale, offset } = app.canvas.ds;"
            "const box = app.canvas.canvas.getBoundingClientRect();"
            "return [0, 1].map((i) => (place[i] + offset[i]) * scale + [box.left, box.top][i])",
            kind, name, output,
        )  # fmt: skip
        return round(x), round(y)

    def drag(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Press, move in two strides, let go."""
        actions = ActionChains(self.driver, duration=80)
        pointer = actions.w3c_actions.pointer_action
        pointer.move_to_location(*start)
        pointer.pointer_down()
        pointer.move_to_location((start[0] + end[0]) // 2, (start[1] + end[1]) // 2)
        pointer.move_to_location(*end)
        pointer.pointer_up()
        actions.perform()
        self.frames()

    def screenshot(self, name: str, kind: str | None = None) -> Path:
        """Keep a picture of the window, or of a node in it with a little around."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{self.name}_{name}.png"
        self.driver.save_screenshot(str(path))
        if kind is not None:
            left, top, right, bottom = self.js(
                NODE + "const drawn = document.querySelector(`[data-node-id='${node.id}']`);"
                "const at = drawn?.getBoundingClientRect();"
                "if (at) return [at.left, at.top, at.right, at.bottom];"
                "const { scale, offset } = app.canvas.ds;"
                "const { left, top } = app.canvas.canvas.getBoundingClientRect();"
                "const place = (x, y) => [(x + offset[0]) * scale + left,"
                " (y + offset[1]) * scale + top];"
                "const [x, y] = node.pos; const [width, height] = node.size;"
                "return [...place(x, y - LiteGraph.NODE_TITLE_HEIGHT),"
                " ...place(x + width, y + height)]",
                kind,
            )  # fmt: skip
            with Image.open(path) as window:
                part = window.crop(
                    (
                        max(0, round(left) - AROUND),
                        max(0, round(top) - AROUND),
                        min(window.width, round(right) + AROUND),
                        min(window.height, round(bottom) + AROUND),
                    )
                )
            part.save(path)
        return path

    def errors(self) -> list[str]:
        """Errors in the console since the last call that name the pack or its files. The editor's
        own are left out: on a host without the internet it has many."""
        severe = [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]
        return [m for m in severe if "anystory" in m.lower() and "api.comfy.org" not in m]
