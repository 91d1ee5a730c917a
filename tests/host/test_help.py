"""Help and languages: every node has a page that names its inputs, a tooltip on every input, and
both languages know every node, input and output, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "web" / "docs"


@pytest.fixture(scope="module")
def schemas(pack: ModuleType) -> dict[str, Any]:
    """Node id -> schema of every node of the pack."""
    found = [getattr(pack, name) for name in dir(pack)]
    made = [node.GET_SCHEMA() for node in found if hasattr(node, "GET_SCHEMA")]
    return {schema.node_id: schema for schema in made}


def language(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / name / "nodeDefs.json").read_text())


def test_every_input_has_a_tooltip(schemas: dict[str, Any]) -> None:
    assert len(schemas) == 12
    for name, schema in schemas.items():
        assert len(schema.description) > 20, name
        for entry in schema.inputs:
            assert entry.tooltip and len(entry.tooltip) > 10, (name, entry.id)


def test_every_node_has_a_page(schemas: dict[str, Any]) -> None:
    assert {path.stem for path in HELP.glob("*.md")} == set(schemas)
    for name, schema in schemas.items():
        text = (HELP / f"{name}.md").read_text()
        assert text.startswith(f"# {schema.display_name.removesuffix(' from Public Weights')}")
        numbered = re.sub(r"(subject|mask)_[2-8]\b", r"\1_8", text)
        for entry in (*schema.inputs, *schema.outputs):
            word = getattr(entry, "display_name", None) or entry.id
            known = re.sub(r"(subject|mask)_[2-8]$", r"\1_8", word)
            assert re.search(rf"\b{known}\b", numbered), (name, word)
        for picture in re.findall(r"\]\((\S+\.jpg)\)", text):
            assert (HELP / picture).stat().st_size < 200_000, (name, picture)
        assert f"({name}.jpg)" in text


@pytest.mark.parametrize("name", ["en", "zh"])
def test_languages_know_everything(schemas: dict[str, Any], name: str) -> None:
    texts = language(name)
    assert set(texts) == set(schemas)
    for node, schema in schemas.items():
        entry = texts[node]
        assert entry["display_name"] and entry["description"]
        inputs = entry.get("inputs", {})
        assert set(inputs) == {i.id for i in schema.inputs}, node
        assert all(text["name"] and text["tooltip"] for text in inputs.values()), node
        assert set(entry["outputs"]) == {str(n) for n in range(len(schema.outputs))}, node
        assert all(text["name"] for text in entry["outputs"].values()), node


def test_english_is_what_the_nodes_say(schemas: dict[str, Any]) -> None:
    for node, entry in language("en").items():
        schema = schemas[node]
        assert entry["display_name"] == schema.display_name
        assert entry["description"] == schema.description
        for said in schema.inputs:
            assert entry["inputs"][said.id] == {"name": said.id, "tooltip": said.tooltip}
        outputs = [entry["outputs"][str(n)]["name"] for n in range(len(schema.outputs))]
        assert outputs == [said.display_name for said in schema.outputs]


def test_chinese_is_chinese() -> None:
    for node, entry in language("zh").items():
        inputs = entry.get("inputs", {}).values()
        for text in (entry["description"], *(i["tooltip"] for i in inputs)):
            assert re.search(r"[\u4e00-\u9fff]", text), (node, text)
