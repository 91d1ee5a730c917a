"""What nodes show after one run and another."""

from __future__ import annotations

from editor import NODE, Editor
from viewer import run_two_subjects

HINT = "switch invert_mask"  # what Encode Subject says of a mask that covers the background
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
    editor.set("EncodeSubject", "invert_mask", False)
    editor.queue()
    editor.wait(SHOWN, HINT)
    editor.set("EncodeSubject", "invert_mask", True)
    editor.queue()
    editor.wait(SHOWN.replace("return", "return !"), HINT)
    names = editor.js(NODE + "return node.widgets.map((widget) => widget.name)", "EncodeSubject")
    assert "$$node-text-preview" not in names
