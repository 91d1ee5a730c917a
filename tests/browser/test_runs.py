"""What nodes show after one run and another."""

from __future__ import annotations

from editor import NODE, Editor
from viewer import PREVIEW, VIEWER, drawn, element, run_two_subjects

HINT = "set mask_shows to auto"  # what Encode Subject says of a mask that covers the background
NO_ROUTES = "No subject acted in this run"
# Whether the page shows a text.
SHOWN = (
    "return [...document.querySelectorAll('span, p, div')].some((element) =>"
    " !element.children.length && element.checkVisibility() &&"
    " element.textContent.includes(arguments[0]))"
)


def test_a_note_goes_when_there_is_nothing_to_say(editor: Editor) -> None:
    run_two_subjects(editor)
    editor.look_at("EncodeSubject")
    assert not editor.js(SHOWN, HINT)
    editor.set("EncodeSubject", "mask_shows", "subject")
    editor.queue()
    editor.wait(SHOWN, HINT)
    editor.set("EncodeSubject", "mask_shows", "background")
    editor.queue()
    editor.wait(SHOWN.replace("return", "return !"), HINT)
    names = editor.js(NODE + "return node.widgets.map((widget) => widget.name)", "EncodeSubject")
    assert "$$node-text-preview" not in names


def test_routes_of_an_earlier_run_go(editor: Editor) -> None:
    run_two_subjects(editor)
    before = drawn(editor)
    for name in ("strength", "reference_strength"):
        editor.set("ApplyAnyStory", name, 0)
    editor.queue()
    editor.wait("return !document.querySelector(arguments[0])", f"{VIEWER} fieldset input")
    editor.wait(SHOWN, NO_ROUTES)
    assert drawn(editor) != before
    assert element(editor, ".where").text == "No routes were recorded here."
    for name in ("step", "block"):
        assert element(editor, f"input[name={name}]").get_attribute("max") == "0"
    editor.screenshot(f"no_routes_{'vue' if editor.vue else 'canvas'}", PREVIEW)
    for name in ("strength", "reference_strength"):
        editor.set("ApplyAnyStory", name, 1)
    editor.queue()
    editor.wait("return document.querySelector(arguments[0])", f"{VIEWER} fieldset input")
    assert drawn(editor) == before
    editor.wait(SHOWN.replace("return", "return !"), NO_ROUTES)


def test_a_file_that_is_lost_leaves_nothing_of_the_run_before(editor: Editor) -> None:
    shown = run_two_subjects(editor)
    (entry,) = shown["anystory_routes"]
    lost = {**shown, "anystory_routes": [{**entry, "file": {**entry["file"], "filename": "no"}}]}
    editor.js(NODE + "node.onExecuted(arguments[1])", PREVIEW, lost)
    editor.wait("return !document.querySelector(arguments[0])", f"{VIEWER} fieldset input")
    assert "no longer has this run's routes" in element(editor, ".where").text
    editor.js(NODE + "node.onExecuted(arguments[1])", PREVIEW, shown)
    editor.wait("return document.querySelector(arguments[0])", f"{VIEWER} fieldset input")
    editor.errors()  # the missing file's
