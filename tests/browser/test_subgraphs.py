"""Our nodes inside of subgraphs, and on their way in and out."""

from __future__ import annotations

from typing import Any

import pytest
from editor import Editor
from viewer import PREVIEW

ENCODE = 3  # id of one Encode Subject in the graph
# Moves the nodes of some types into a subgraph; the id of its node.
PACK = (
    "const kinds = arguments[0];"
    "const chosen = app.graph._nodes.filter((node) => kinds.includes(node.type));"
    "return app.graph.convertToSubgraph(new Set(chosen)).node.id"
)
UNPACK = "app.graph.unpackSubgraph(app.graph.getNodeById(arguments[0]))"
# What is linked with what, by titles and names; and links that their inputs do not know of.
LINKS = (
    "const links = [...app.graph.links.values()].map((link) => {"
    " const [from, to] = [link.origin_id, link.target_id].map((id) => app.graph.getNodeById(id));"
    " const input = to.inputs[link.target_slot];"
    " return { ends: [from.pos[1] < 400, from.type, link.origin_slot, to.type, input?.name].join(),"
    " known: input?.link === link.id }; });"
    "return [links.map((link) => link.ends).sort(), links.filter((link) => !link.known)]"
)


def links(editor: Editor) -> Any:
    return editor.js(LINKS)


def test_a_router_that_leaves_a_subgraph_keeps_all_links(editor: Editor) -> None:
    """Links inside may have the numbers of other links outside."""
    editor.template("two_subjects")
    editor.frames()
    before = links(editor)
    node = editor.js(PACK, ["SubjectRouter"])
    editor.frames()
    saved = editor.saved()
    (inside,) = saved["definitions"]["subgraphs"]
    (router,) = inside["nodes"]
    taken = {link[0] for link in saved["links"] if link[3] == ENCODE and link[4] >= 2}
    linked = [entry for entry in router["inputs"] if entry["link"] is not None]
    numbers = dict(zip((entry["link"] for entry in linked), sorted(taken), strict=True))
    for entry in linked:
        entry["link"] = numbers[entry["link"]]
    for link in inside["links"]:
        link["id"] = numbers.get(link["id"], link["id"])
    for socket in inside["inputs"]:
        socket["linkIds"] = [numbers[number] for number in socket["linkIds"]]
    editor.load(saved)
    editor.frames()
    editor.js(UNPACK, node)
    editor.frames()
    assert links(editor) == before


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "graph"])
def test_outputs_find_a_viewer_in_a_subgraph(editor: Editor, by_path: bool) -> None:
    """Editors keep outputs by the ids of the nodes on the way, or by the id of the subgraph."""
    editor.template("two_subjects")
    node = editor.js(PACK, [PREVIEW])
    editor.frames()
    inside, graph = editor.js(
        "const { subgraph } = app.graph.getNodeById(arguments[0]);"
        "return [subgraph.nodes[0].id, subgraph.id]",
        node,
    )
    lost = {"filename": "none", "subfolder": "", "type": "temp"}
    shown = {"anystory_routes": [{"file": lost, "layout": {}}], "text": []}
    editor.js(
        "app.nodeOutputs = { [arguments[0]]: arguments[1] }",
        f"{node if by_path else graph}:{inside}",
        shown,
    )
    names = (
        "return app.graph.getNodeById(arguments[0]).subgraph.nodes[0].widgets.map((w) => w.name)"
    )
    assert "anystory_routes" in editor.js(names, node)
    editor.frames()
    editor.errors()  # the missing file's
