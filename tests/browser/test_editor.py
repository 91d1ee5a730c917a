"""What a person sees in the editor: templates, the viewer of the routes, the router's inputs."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
import pytest
from editor import CARD, NODE, PACK, TEMPLATES, Editor
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from viewer import PREVIEW, VIEWER, drawn, element, recorded, run_two_subjects

BESIDE = 400  # pixels from the left where the editor's own controls hide no node
KNOWN = "return arguments[0] in LiteGraph.registered_node_types"


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "vue"])
def opened(browser: Editor, request: pytest.FixtureRequest) -> Editor:
    """The editor, loaded once for tests that only open graphs."""
    browser.open(vue=request.param)
    browser.errors()
    return browser


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_open(opened: Editor, name: str) -> None:
    saved = opened.client.get(f"/api/workflow_templates/{PACK}/{name}.json")
    assert saved == json.loads(TEMPLATES[name].read_text())
    if not opened.vue and name == "two_subjects":
        opened.load_template(name)
    else:  # the browser of templates is slow: once is enough
        opened.load(saved)
    kinds = opened.js("return app.graph._nodes.map((node) => node.type)")
    assert sorted(kinds) == sorted(node["type"] for node in saved["nodes"])
    assert [kind for kind in kinds if not opened.js(KNOWN, kind)] == []
    if opened.vue:
        drawn = "return document.querySelectorAll('[data-node-id]').length >= arguments[0]"
        opened.js("app.canvas.ds.scale = 0.3; app.canvas.ds.offset = [600, 100]")
        opened.wait(drawn, len(kinds))
    opened.frames()
    assert opened.errors() == []


@pytest.mark.parametrize("opened", [False], indirect=True, ids=["canvas"])
def test_template_browser_shows_every_picture(opened: Editor) -> None:
    opened.browse_templates()
    for name in TEMPLATES:
        opened.wait(
            "const card = document.querySelector(arguments[0]); card?.scrollIntoView();"
            "const picture = card?.querySelector('img');"
            "return picture?.complete && picture.naturalWidth > 0",
            CARD.format(name),
        )
    opened.screenshot("templates")
    opened.choose(next(iter(TEMPLATES)))  # Escape does not close it in every editor
    assert opened.errors() == []


def test_picture_and_viewer_appear(editor: Editor) -> None:
    shown = run_two_subjects(editor)
    (entry,) = shown["anystory_routes"]
    steps = recorded(editor, entry)
    blocks = sorted(steps[0])
    labels = entry["layout"]["labels"]
    pictures = {drawn(editor)}
    where = element(editor, ".where")
    step, block = (element(editor, f"input[name={name}]") for name in ("step", "block"))
    canvas = element(editor, "canvas")
    assert canvas.aria_role == "application"  # screen readers leave its keys to it
    assert step.get_attribute("aria-valuetext").startswith("3 of 3")  # routes are best at the end
    for number, index in ((0, blocks[0]), (2, blocks[0]), (2, blocks[-1])):
        # The keyboard alone: Home is "all blocks", the first arrow is the first block.
        step.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * number)
        block.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * (blocks.index(index) + 1))
        assert step.get_attribute("aria-valuetext").startswith(f"{number + 1} of 3")
        ids = steps[number][index]
        height, width = ids.shape
        canvas.send_keys(Keys.ARROW_UP)  # the marker appears in the middle
        y, x = height // 2, width // 2
        for key, dy, dx in ((None, 0, 0), (Keys.ARROW_LEFT, 0, -1), (Keys.ARROW_UP, -1, 0)):
            if key:
                canvas.send_keys(key)
            y, x = y + dy, x + dx
            name = entry["layout"]["blocks"][str(index)]
            assert where.text == f"{labels[ids[y, x]]} · {name} · {width}×{height}"
        block.send_keys(Keys.NULL)  # the marker leaves with the focus
        pictures.add(drawn(editor))
    assert len(pictures) == 4  # every move of a slider showed another map
    ActionChains(editor.driver).move_to_element(element(editor, "fieldset")).perform()
    editor.look_at(PREVIEW, 0.9, BESIDE)
    editor.screenshot(f"viewer_{'vue' if editor.vue else 'canvas'}", PREVIEW)


def test_a_wide_picture_whose_subjects_act_in_between(editor: Editor) -> None:
    """The first and the last step have no map; the viewer takes its shape from the others."""
    editor.template("two_subjects", steps=6)
    editor.set("EmptyLatentImage", "width", 192)
    editor.set("ApplyAnyStory", "start", 0.3)
    editor.set("ApplyAnyStory", "end", 0.7)
    editor.js(
        "const node = app.graph._nodes.find((one) => one.type === arguments[0]);"
        "node.disconnectInput(node.inputs.findIndex((input) => input.name === 'image'))",
        PREVIEW,
    )
    outputs = editor.queue()
    (shown,) = [out for out in outputs.values() if "anystory_routes" in out]
    steps = recorded(editor, shown["anystory_routes"][0])
    assert not steps[0] and not steps[-1] and any(steps)
    editor.wait("return document.querySelector(arguments[0])", f"{VIEWER} fieldset input")
    canvas = element(editor, "canvas")
    width, height = (int(canvas.get_attribute(name)) for name in ("width", "height"))
    assert (width, height) == (512, 341)  # 3:2


def test_a_sampler_that_calls_the_model_between_the_steps(editor: Editor) -> None:
    """The viewer has all noise levels, and tells of which step each is."""
    editor.template("two_subjects")
    editor.set("KSampler", "sampler_name", "dpm_2")
    outputs = editor.queue()
    (shown,) = [out for out in outputs.values() if "anystory_routes" in out]
    steps = shown["anystory_routes"][0]["layout"]["steps"]
    assert [step["number"] for step in steps] == [0, 0, 1, 1, 2]
    editor.look_at(PREVIEW)
    editor.wait("return document.querySelector(arguments[0])", f"{VIEWER} fieldset input")
    slider = element(editor, "input[name=step]")
    for place, step in enumerate(steps):
        slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * place)
        text = slider.get_attribute("aria-valuetext")
        sigma = str(step["sigma"]).removesuffix(".0")  # as JavaScript writes a whole number
        assert text == f"{step['number'] + 1} of 3, σ {sigma}"


def test_pointer_and_switches(editor: Editor) -> None:
    shown = run_two_subjects(editor)
    (entry,) = shown["anystory_routes"]
    labels = entry["layout"]["labels"]
    canvas, where = element(editor, "canvas"), element(editor, ".where")
    element(editor, "input[name=block]").send_keys(Keys.END)
    ids = recorded(editor, entry)[-1][max(int(n) for n in entry["layout"]["blocks"])]
    # A square picture lies in the middle of the canvas' box; its upper left token:
    side = min(canvas.size["width"], canvas.size["height"])
    corner = -side // 2 + side // (2 * ids.shape[0])
    ActionChains(editor.driver).move_to_element_with_offset(canvas, corner, corner).perform()
    assert where.text.startswith(f"{labels[ids[0, 0]]} · ")
    ActionChains(editor.driver).move_to_element(element(editor, "fieldset")).perform()
    boxes = editor.driver.find_elements(By.CSS_SELECTOR, f"{VIEWER} fieldset input")
    assert [box.is_selected() for box in boxes] == [True, True, False]
    named = [box.accessible_name for box in boxes]
    assert all(label in name for label, name in zip(labels, named, strict=True))
    shares = [float(np.mean(ids == i)) for i in range(3)]
    for name, share in zip(named, shares, strict=True):
        places = Decimal(1) if share >= 0.1 or share == 0 else Decimal("0.1")
        # Halves go up in the viewer; shares of 64 tokens are exact.
        wanted = Decimal(100 * share).quantize(places, ROUND_HALF_UP)
        assert name.endswith(f" {wanted} %")
    for box, share in zip(boxes, shares, strict=True):
        before = drawn(editor)
        box.click()
        assert (drawn(editor) != before) == (share > 0)
    assert [box.is_selected() for box in boxes] == [False, False, True]


def test_the_middle_button_moves_the_canvas(editor: Editor) -> None:
    run_two_subjects(editor)
    offset = "return [...app.canvas.ds.offset]"
    x, y = editor.js(offset)
    pointer = ActionChains(editor.driver, duration=80)
    actions = pointer.w3c_actions.pointer_action
    actions.move_to(element(editor, "canvas"))
    actions.pointer_down(button=1)
    actions.move_by(60, 40)
    actions.pointer_up(button=1)
    pointer.perform()
    editor.frames()
    assert editor.js(offset) == pytest.approx([x + 60, y + 40], abs=1)


def test_long_notes_have_room(editor: Editor) -> None:
    shown = run_two_subjects(editor)
    told = {**shown, "text": ["a warning of many words " * 8] * 2}
    editor.js(NODE + "node.onExecuted(arguments[1])", PREVIEW, told)
    editor.wait(
        "const viewer = document.querySelector(arguments[0]);"
        "const [map, notes] = ['.stage', '.notes'].map((part) => viewer.querySelector(part));"
        "const room = viewer.parentElement.getBoundingClientRect().bottom;"
        "return notes.offsetHeight > 80 && map.offsetHeight >= 240 &&"
        " notes.getBoundingClientRect().bottom <= room + 1",
        VIEWER,
    )
    colour = "return getComputedStyle(document.querySelector(arguments[0])).color"
    # That of all text, which the editor's palettes set for light and dark nodes.
    assert editor.js(colour, f"{VIEWER} .note") == editor.js(colour, VIEWER)
    editor.screenshot(f"notes_{'vue' if editor.vue else 'canvas'}")


def values(saved: dict[str, Any]) -> dict[int, Any]:
    """All widgets' values of a saved graph."""
    return {node["id"]: node.get("widgets_values") for node in saved["nodes"]}


def inputs_of(node: dict[str, Any]) -> list[str]:
    """Names of a saved node's sockets, widgets' own left out."""
    return [entry["name"] for entry in node["inputs"] if "widget" not in entry]


def test_a_saved_graph_comes_back_the_same(editor: Editor) -> None:
    run_two_subjects(editor)
    editor.set("KSampler", "seed", 12345)
    editor.set(PREVIEW, "steps", "2, last")
    editor.set("SubjectRouter", "mode", "masks")
    saved, prompt = editor.saved(), editor.prompt()
    router = next(node for node in saved["nodes"] if node["type"] == "SubjectRouter")
    linked = {entry["name"] for entry in router["inputs"] if entry.get("link") is not None}
    assert linked == {"anystory", "subject_1", "subject_2"}
    for link in saved["links"]:  # a link names its socket by place
        if link[3] == router["id"]:
            assert router["inputs"][link[4]]["link"] == link[0]
    editor.open(vue=editor.vue)
    editor.load(saved)
    editor.frames()
    assert editor.prompt() == prompt
    assert values(editor.saved()) == values(saved)
    assert editor.inputs("SubjectRouter") == inputs_of(router)


def test_one_more_input_than_is_used(editor: Editor) -> None:
    editor.template("two_subjects")
    editor.frames()
    pairs = [f"{kind}_{n}" for n in (1, 2, 3) for kind in ("subject", "mask")]
    assert editor.inputs("SubjectRouter") == ["anystory", *pairs, "clip"]
    spare = editor.js(NODE + "return node.size[1] - node.computeSize()[1]", "SubjectRouter")
    assert editor.vue or abs(spare) <= 1  # the body is as high as its sockets
    editor.look_at("SubjectRouter", 1.0, BESIDE)
    editor.screenshot(f"router_{'vue' if editor.vue else 'canvas'}", "SubjectRouter")
    editor.look_at("EncodeSubject", 0.8)
    start = editor.slot("EncodeSubject", "subject", output=True)
    editor.drag(start, editor.slot("SubjectRouter", "subject_3", output=False))
    more = [*pairs, "subject_4", "mask_4"]
    assert editor.inputs("SubjectRouter") == ["anystory", *more, "clip"]
    editor.screenshot(f"more_{'vue' if editor.vue else 'canvas'}")
    (given,) = [n["inputs"] for n in editor.prompt().values() if n["class_type"] == "SubjectRouter"]
    values = {"mode", "agreement", "text_block"}
    assert set(given) == {"anystory", "subject_1", "subject_2", "subject_3"} | values
    assert given["subject_3"] == given["subject_1"] != given["subject_2"]
    editor.js(
        "const node = app.graph._nodes.find((n) => n.type === 'SubjectRouter');"
        "node.disconnectInput(node.inputs.findIndex((input) => input.name === 'subject_3'))"
    )
    editor.frames()
    assert editor.inputs("SubjectRouter") == ["anystory", *pairs, "clip"]


def test_a_copied_router_keeps_its_links(opened: Editor) -> None:
    """The editor links pasted nodes by the numbers of their saved sockets."""
    opened.load(json.loads(TEMPLATES["public_weights_sdxl"].read_text()))
    opened.frames()
    opened.js(
        "const { canvas } = app; canvas.selectItems();"
        "canvas.copyToClipboard(); canvas.pasteFromClipboard();"
    )
    opened.frames()
    routers = [node for node in opened.saved()["nodes"] if node["type"] == "SubjectRouter"]
    first, second = (
        [entry["name"] for entry in node["inputs"] if entry.get("link") is not None]
        for node in routers
    )
    assert first == second and "clip" in first
    assert inputs_of(routers[0]) == inputs_of(routers[1])


def test_what_was_shown_comes_back(editor: Editor) -> None:
    """With the outputs that the editor keeps: of the tab before, or of the history."""
    shown, saved = run_two_subjects(editor), editor.saved()
    node = next(node["id"] for node in saved["nodes"] if node["type"] == PREVIEW)
    editor.open(vue=editor.vue)
    editor.load(saved)
    editor.frames()
    visible = "return Boolean(document.querySelector(arguments[0])?.checkVisibility())"
    assert not editor.js(visible, VIEWER)
    editor.js("app.nodeOutputs = { [arguments[0]]: arguments[1] }", str(node), shown)
    editor.look_at(PREVIEW)
    editor.wait(visible, VIEWER)


def test_without_the_script(browser: Editor) -> None:
    """A graph saved with the script opens and runs without it, and the node shows its pictures."""
    browser.open()
    browser.template("two_subjects")
    browser.frames()
    saved, prompt = browser.saved(), browser.prompt()
    browser.open(script=False)
    browser.load(saved)
    assert browser.prompt() == prompt
    assert values(browser.saved()) == values(saved)
    assert len(browser.inputs("SubjectRouter")) == 18
    browser.queue()
    browser.look_at(PREVIEW)
    browser.wait(
        "return app.graph._nodes.find((n) => n.type === arguments[0]).imgs?.length === 2", PREVIEW
    )
