"""Help and languages: every node has a page that names its inputs, outputs and ranges and quotes
real messages, a tooltip on every input, and both languages know every node, input and output, and
nothing else."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "web" / "docs"
LANGUAGES = ("en", "zh")
NUMBERED = re.compile(r"\b(subject|mask)_[1-8]\b")  # the pages show only the first and the last
LARGEST = 2**32  # seeds and their like have no range that a person reads
WRONG = "## What goes wrong"
UNSTATED = "…"  # in the pages: a value that a message fills in


@pytest.fixture(scope="module")
def schemas(pack: ModuleType) -> dict[str, Any]:
    """Node id -> schema of every node of the pack."""
    made = [node.define_schema() for node in pack.NODES]
    return {schema.node_id: schema for schema in made}


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """Every text in the code that a user may read, with UNSTATED for what is filled in."""
    folders = ROOT / "nodes", ROOT / "anystory_core"
    return [
        text
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for text in texts_of(ast.parse(path.read_text(encoding="utf-8")))
    ]


def texts_of(tree: ast.Module) -> Iterator[str]:
    """String literals and f-strings of a module, but for the docstrings."""
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else UNSTATED for p in node.values)
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from () if id(node) in documents else (node.value,)


def page(name: str) -> str:
    return (HELP / f"{name}.md").read_text(encoding="utf-8")


def rows_of(name: str) -> list[str]:
    """First cells of a page's tables."""
    return [line.split("|")[1].strip() for line in page(name).splitlines() if line[:2] == "| "]


def row(name: str, entry: str) -> str:
    """The line of a page's tables that tells of an input or output."""
    lines = [line for line in page(name).splitlines() if line.startswith(f"| {entry} |")]
    assert len(lines) >= 1, f"{name}: no row for {entry}"
    return "\n".join(lines)


def language(name: str) -> dict[str, Any]:
    text = (ROOT / "locales" / name / "nodeDefs.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def leaves(tree: dict[str, Any]) -> Iterator[str]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def test_every_input_has_a_tooltip(schemas: dict[str, Any]) -> None:
    assert len(schemas) == 14
    for name, schema in schemas.items():
        assert len(schema.description) > 20, name
        for entry in schema.inputs:
            assert entry.tooltip and len(entry.tooltip) > 10, (name, entry.id)


def test_every_node_has_a_page(schemas: dict[str, Any]) -> None:
    assert {path.stem for path in HELP.glob("*.md")} == set(schemas)
    for name, schema in schemas.items():
        text = page(name)
        assert text.startswith(f"# {schema.display_name}\n"), name
        assert f"\n![{schema.display_name}]({name}.jpg)\n" in text, name
        assert 25 <= len(text.splitlines()) <= 60, name


def test_pictures_are_there_and_small() -> None:
    for path in HELP.glob("*.md"):
        for picture in re.findall(r"\]\((\S+\.jpg)\)", page(path.stem)):
            assert (HELP / picture).is_file(), f"{path.name}: {picture} is missing"
            assert (HELP / picture).stat().st_size < 200_000, (path.name, picture)


def test_pages_tell_of_every_input_and_output(schemas: dict[str, Any]) -> None:
    for name, schema in schemas.items():
        entries = {entry.id for entry in schema.inputs}
        named = {entry for entry in entries if not NUMBERED.fullmatch(entry)}
        for entry in named | {said.display_name for said in schema.outputs}:
            assert len(row(name, entry)) > len(entry) + 12, (name, entry)
        numbered = {f"{first}_1 {UNSTATED} {first}_8" for first in ("subject", "mask")}
        told = set(rows_of(name)) & numbered
        assert told == (numbered if entries - named else set()), name


def test_pages_give_ranges_and_choices(schemas: dict[str, Any]) -> None:
    for name, schema in schemas.items():
        for entry in schema.inputs:
            largest = getattr(entry, "max", None)
            if largest is not None and largest < LARGEST:
                assert f"| {entry.min:g}–{largest:g}" in row(name, entry.id), (name, entry.id)
    # Choices that the code itself makes; the others are files.
    for name, entry in (
        ("SubjectRouter", "mode"),
        ("SaveAnyStorySubject", "place"),
        ("BuildAnyStory", "reference_net"),
        ("BuildAnyStory", "precision"),
    ):
        choices = next(said.options for said in schemas[name].inputs if said.id == entry)
        known = rows_of(name) if entry == "mode" else re.findall(r"\*(\w+)\*", row(name, entry))
        assert set(choices) <= set(known), (name, entry)


def test_pages_quote_messages_of_the_code(schemas: dict[str, Any], messages: list[str]) -> None:
    """A quoted message that the code no longer says would send its reader the wrong way."""
    for name in schemas:
        _, found, wrong = page(name).partition(WRONG)
        assert found, name
        quotes = [
            quote
            for start in re.findall(r"^- (`[^`]+`(?:, `[^`]+`)*)", wrong, re.MULTILINE)
            for quote in re.findall(r"`([^`]+)`", start)
        ]
        assert quotes, name
        for quote in quotes:
            parts = [re.escape(part) for part in quote.split(UNSTATED)]
            wanted = re.compile(".*".join(parts), re.DOTALL)
            assert any(wanted.search(text) for text in messages), (name, quote)


@pytest.mark.parametrize("name", LANGUAGES)
def test_languages_know_everything(schemas: dict[str, Any], name: str) -> None:
    texts = language(name)
    assert set(texts) == set(schemas)
    for node, schema in schemas.items():
        entry = texts[node]
        assert set(entry) == {"display_name", "description", "outputs"} | (
            {"inputs"} if schema.inputs else set()
        ), node
        assert entry["display_name"] and entry["description"], node
        inputs = entry.get("inputs", {})
        assert set(inputs) == {said.id for said in schema.inputs}, node
        assert all(set(text) == {"name", "tooltip"} for text in inputs.values()), node
        assert set(entry["outputs"]) == {str(n) for n in range(len(schema.outputs))}, node
    assert all(text.strip() for text in leaves(texts))


@pytest.mark.parametrize("name", LANGUAGES)
def test_languages_have_no_signs_that_the_editor_reads(name: str) -> None:
    """vue-i18n takes these for placeholders, links and plurals, and shows something else."""
    assert not [text for text in leaves(language(name)) if re.search(r"[{}@|]", text)]


def test_english_is_what_the_nodes_say(schemas: dict[str, Any]) -> None:
    for node, entry in language("en").items():
        schema = schemas[node]
        assert entry["display_name"] == schema.display_name
        assert entry["description"] == schema.description
        for said in schema.inputs:
            wanted = {"name": said.display_name or said.id, "tooltip": said.tooltip}
            assert entry["inputs"][said.id] == wanted, (node, said.id)
        for number, said in enumerate(schema.outputs):
            wanted = {"name": said.display_name}
            wanted |= {"tooltip": said.tooltip} if said.tooltip else {}
            assert entry["outputs"][str(number)] == wanted, (node, number)


def test_chinese_is_chinese() -> None:
    english = language("en")
    for node, entry in language("zh").items():
        inputs = entry.get("inputs", {})
        for text in (entry["description"], *(i["tooltip"] for i in inputs.values())):
            assert re.search(r"[\u4e00-\u9fff]", text), (node, text)
        for name, text in inputs.items():
            choices = set(re.findall(r"\b[a-z]+ within masks\b", text["tooltip"]))
            said = english[node]["inputs"][name]["tooltip"]
            assert choices == set(re.findall(r"\b[a-z]+ within masks\b", said)), (node, name)
