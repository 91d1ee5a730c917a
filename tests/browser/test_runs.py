"""What nodes show after one run and another."""

from __future__ import annotations

import pytest
from editor import NODE, Editor
from viewer import PREVIEW, VIEWER, drawn, element, run_two_subjects

HINT = "set mask_shows to auto"  # what Encode Subject says of a mask that covers the background
NO_ROUTES = "No subject acted in this run"
IDLE = "return app.ui.lastQueueSize === 0"  # the last job has ended for the editor, too
# Whether the page shows a text.
SHOWN = (
    "return [...document.querySelectorAll('span, p, div')].some((element) =>"
    " !element.children.length && element.checkVisibility() &&"
    " element.textContent.includes(arguments[0]))"
)


def test_a_note_stays_until_there_is_nothing_to_say(editor: Editor) -> None:
    """Beyond the end of its job, and through jobs that take the node from the host's cache."""
    run_two_subjects(editor)
    editor.look_at("EncodeSubject")
    assert not editor.js(SHOWN, HINT)
    editor.set("EncodeSubject", "mask_shows", "subject")
    editor.queue()
    editor.wait(SHOWN, HINT)
    editor.wait(IDLE)
    editor.set("KSampler", "seed", 77)
    editor.queue()
    editor.wait(IDLE)
    editor.frames()
    assert editor.js(SHOWN, HINT)
    editor.screenshot(f"note_{'vue' if editor.vue else 'canvas'}", "EncodeSubject")
    editor.set("EncodeSubject", "mask_shows", "background")
    editor.queue()
    editor.wait(SHOWN.replace("return", "return !"), HINT)
    names = editor.js(NODE + "return node.widgets.map((widget) => widget.name)", "EncodeSubject")
    assert "anystory_note" not in names


def test_a_note_comes_back_with_the_graph(editor: Editor) -> None:
    """With the outputs that the editor keeps: of the tab before, or of the history."""
    editor.template("two_subjects")
    node = editor.js(NODE + "return node.id", "EncodeSubject")
    editor.js("app.nodeOutputs = { [arguments[0]]: { text: [arguments[1]] } }", str(node), HINT)
    editor.look_at("EncodeSubject")
    editor.wait(SHOWN, HINT)


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>: saved & done",
        # Older editors put a link's words into another link's address.
        'https://a/[[" onfocus=alert(1) x="|b]]',
    ],
)
def test_a_note_is_text_and_never_html(editor: Editor, text: str) -> None:
    """Labels and names of files are other people's."""
    editor.template("two_subjects")
    editor.look_at("EncodeSubject")
    editor.js(NODE + "node.onExecuted({ text: [arguments[1]] })", "EncodeSubject", text)
    editor.wait(SHOWN, text)
    assert editor.js("return document.querySelector('.anystory-note').textContent") == text
    assert not editor.js("return document.querySelector('.anystory-note :not(p)')")


def test_a_long_note_has_room(editor: Editor) -> None:
    editor.template("two_subjects")
    editor.look_at("EncodeSubject")
    told = ["a note of many words " * 12, "another"]
    before = editor.js(NODE + "return node.size[1]", "EncodeSubject")
    editor.js(NODE + "node.onExecuted({ text: arguments[1] })", "EncodeSubject", told)
    editor.wait(
        "const note = document.querySelector('.anystory-note');"
        "return note?.offsetHeight > 60 && note.scrollHeight <= note.clientHeight + 1"
    )
    needed, height = editor.js(
        NODE + "return [node.computeSize()[1], node.size[1]]", "EncodeSubject"
    )
    assert editor.vue or height <= max(before, needed) + 1  # and no more than that
    editor.screenshot(f"long_note_{'vue' if editor.vue else 'canvas'}", "EncodeSubject")


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
