"""The editor's graphs: the same as the queue's graphs of the same name, whole, each with a picture
and a note that says what to change first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from devkit.client import Client
from devkit.graphs import FOLDER, LARGE, read_graph
from devkit.host import Host

BOTH = sorted({p.stem for p in FOLDER.glob("*.json")} & {p.stem for p in FOLDER.glob("api/*.json")})
TEMPLATES = sorted(FOLDER.glob("*.json"))
FLUX = {f"{name}_flux" for name in ("single_subject", "two_subjects", "story")}
LARGEST = 100 * 1024  # bytes of a picture
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}  # the editor's own, unknown to the queue


@pytest.fixture(scope="module")
def inputs(host: Host) -> Any:
    """Node type -> [(input, is a widget, widgets that the editor adds behind it)], host's order."""
    known = Client(host.url).get("/object_info")

    def of(kind: str) -> list[tuple[str, bool, int]]:
        found = []
        for group in ("required", "optional"):
            for name, entry in known[kind]["input"].get(group, {}).items():
                options = entry[1] if len(entry) > 1 else {}
                widget = isinstance(entry[0], list) or entry[0] in WIDGETS
                added = int(name == "seed") + int(bool(options.get("image_upload")))
                found.append((name, widget, added))
        return found

    return of


def read_note(graph: dict[str, Any]) -> str:
    """The text of an editor's graph's only note."""
    (note,) = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] in NOTES]
    return note


def read_template(name: str) -> tuple[dict[str, Any], str]:
    """(inputs of the queue's graph by node type, the note of the editor's graph)."""
    of = {node["class_type"]: node["inputs"] for node in read_graph(name).values()}
    return of, read_note(json.loads((FOLDER / f"{name}.json").read_text()))


def to_prompt(graph: dict[str, Any], inputs: Any) -> dict[int, dict[str, Any]]:
    """What the editor queues: node id -> class and inputs."""
    links = {link[0]: [link[1], link[2]] for link in graph["links"]}
    prompt: dict[int, dict[str, Any]] = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        values = list(node["widgets_values"])
        connected = {i["name"]: i["link"] for i in node["inputs"] if i["link"] is not None}
        given: dict[str, Any] = {}
        for name, widget, added in inputs(node["type"]):
            if widget:
                given[name] = values.pop(0)
                del values[:added]
            if name in connected:
                given[name] = links[connected[name]]
        assert not values, f"{node['type']}: {values} left over"
        prompt[node["id"]] = {"class_type": node["type"], "inputs": given}
    return prompt


@pytest.mark.parametrize("name", BOTH)
def test_editor_graph_equals_queue_graph(name: str, inputs: Any) -> None:
    prompt = to_prompt(json.loads((FOLDER / f"{name}.json").read_text()), inputs)
    api = read_graph(name)
    number = dict(zip(api, prompt, strict=True))  # both list their nodes in one order
    for key, node in api.items():
        mine = prompt[number[key]]
        assert mine["class_type"] == node["class_type"]
        for name_, value in node["inputs"].items():
            wanted = [number[value[0]], value[1]] if isinstance(value, list) else value
            assert mine["inputs"][name_] == wanted, (node["class_type"], name_)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_links_are_whole(path: Path) -> None:
    """Both ends of every link know it, and its type."""
    graph = json.loads(path.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and max(nodes) == graph["last_node_id"]
    for link, source, slot, target, place, kind in graph["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][place]["link"] == link


def test_pictures_are_there_and_small() -> None:
    pictures = sorted(FOLDER.glob("*.jpg"))
    assert [p.stem for p in pictures] == [p.stem for p in TEMPLATES]
    for path in pictures:
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("JPEG", (512, 512)), path.name
        assert path.stat().st_size <= LARGEST, path.name


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_notes_say_what_to_change_first(path: Path) -> None:
    """And the nodes and inputs that they name are in the graph."""
    graph = json.loads(path.read_text())
    note = read_note(graph)
    _, found, advice = note.partition("Change first: ")
    advice, *_ = advice.split("\n\n")
    assert found and advice
    named = {name.replace(" ", "") for name in re.findall(r"\*\*([^*]+)\*\*", advice)}
    assert named <= {node["type"] for node in graph["nodes"]}
    known = read_graph(path.stem).values()
    inputs = set(re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", advice))
    assert named | inputs and inputs <= {name for node in known for name in node["inputs"]}
    assert ("drawn with the small model" in note) == path.stem.endswith(LARGE)


def test_the_graphs_are_there() -> None:
    large = {"single_subject", "two_subjects", "two_subjects_masks"}
    small = {"three_subjects", "routes", "segmentation", "hires_fix", "story"}
    public = {"public_weights", "public_mip", "public_ms_diffusion"}
    sdxl = {f"{name}_sdxl" for name in large | public}
    assert set(BOTH) == large | small | sdxl | FLUX
    assert {path.stem for path in FOLDER.glob("*.json")} == set(BOTH)


@pytest.mark.parametrize("name", ["public_mip_sdxl", "public_ms_diffusion_sdxl"])
def test_the_graphs_of_other_public_adapters(name: str, host: Host) -> None:
    """The note says how the file is made that the graph loads, the page on public weights has its
    files, and the labels are read where the adapter needs them."""
    of, note = read_template(name)
    assert of["LoadAnyStory"]["anystory_name"] == f"{name}.safetensors"
    assert of["SubjectRouter"]["mode"] == "masks"
    assert ("clip" in of["EncodeSubject"]) == (name == "public_ms_diffusion_sdxl")
    assert f"*name* = `{name}`" in note and of["CLIPVisionLoader"]["clip_name"] in note
    page = (FOLDER.parent / "docs" / "public_weights.md").read_text()
    (adapter,) = set(re.findall(r"`(\w+\.bin)`", note))
    assert adapter in page and of["CLIPVisionLoader"]["clip_name"] in page
    builder = Client(host.url).get("/object_info")["BuildAnyStory"]["input"]["required"]
    assert "*reference_net* = *none*" in note and "reference_net" in builder


def test_the_graph_of_public_weights_names_what_the_builder_writes(host: Host) -> None:
    """The file under its default name, the prompt's words wired for the modes with text, and each
    public file in the note as the page on public weights has it."""
    builder = Client(host.url).get("/object_info")["BuildAnyStory"]["input"]["required"]
    of, note = read_template("public_weights_sdxl")
    assert of["LoadAnyStory"]["anystory_name"] == f"{builder['name'][1]['default']}.safetensors"
    assert of["SubjectRouter"]["mode"] == "masks"
    assert of["SubjectRouter"]["clip"] == of["CLIPTextEncode"]["clip"]
    page = (FOLDER.parent / "docs" / "public_weights.md").read_text()
    files = set(re.findall(r"`([^`]+\.safetensors)`", note))
    assert of["CLIPVisionLoader"]["clip_name"] in files and len(files) == 4
    assert all(file in page for file in files)
    assert all(f"models/{folder}" in note for folder in ("checkpoints", "ipadapter", "clip_vision"))


@pytest.mark.parametrize("name", sorted(FLUX))
def test_the_graphs_of_flux_name_their_files(host: Host, name: str) -> None:
    """Every file of a loader is in the note, as is what the builder reads and where it writes; and
    the page on FLUX has them all."""
    known = Client(host.url).get("/object_info")
    builder = known["BuildAnyStoryFlux"]["input"]["required"]
    of, note = read_template(name)
    assert of["LoadAnyStory"]["anystory_name"] == f"{builder['name'][1]['default']}.safetensors"
    assert of["KSampler"]["negative"] == of["KSampler"]["positive"]  # cfg 1 does not read it
    page = (FOLDER.parent / "docs" / "flux.md").read_text()
    loaders = ("UNETLoader", "DualCLIPLoader", "VAELoader", "CLIPVisionLoader", "LoadAnyStory")
    files = {
        value
        for kind in loaders
        for value in of[kind].values()
        if isinstance(value, str) and value.endswith(".safetensors")
    }
    assert len(files) == 6
    for text in (note, page):
        assert all(f"{file}`" in text for file in files), text
        assert "`anystory_flux.bin`" in text and "`flux1-redux-dev.safetensors`" in text
        assert "non-commercial licence" in text and "That is not AnyStory" in text
    assert "models/diffusion_models" in note and known["BuildAnyStoryFlux"]["display_name"] in note
