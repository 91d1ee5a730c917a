"""Muting or bypassing any one of our nodes, as the editor does it: the graph runs, or the host says
which input of which node has nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from test_queue import graph, quick

from devkit.client import Client, PromptError
from devkit.graphs import Prompt, read_graph

OURS = ("AnyStory", "EncodeSubject", "SubjectRouter", "RoutingMapPreview")


def cases() -> list[tuple[str, str, str]]:
    """(graph, number of a node of ours in it, its kind): each kind once, in the first such graph,
    and each Encode Subject of two."""
    found: list[tuple[str, str, str]] = []
    for name in ("two_subjects_masks", "story", "segmentation"):
        for number, node in read_graph(name).items():
            kind = node["class_type"]
            new = kind not in {k for g, _, k in found if g != name}
            if any(part in kind for part in OURS) and new:
                found.append((name, number, kind))
    return found


def without(prompt: Prompt, number: str, passes: dict[int, Any]) -> Prompt:
    """The prompt without a node. Links from its outputs become ``passes``; without one they go."""
    prompt = copy.deepcopy(prompt)
    del prompt[number]
    for node in prompt.values():
        for name, value in list(node["inputs"].items()):
            if isinstance(value, list) and value[0] == number:
                if value[1] in passes:
                    node["inputs"][name] = passes[value[1]]
                else:
                    del node["inputs"][name]
    return prompt


def passed(client: Client, prompt: Prompt, number: str) -> dict[int, Any]:
    """What the editor links instead of a bypassed node's outputs: the first input of that type."""
    kind = prompt[number]["class_type"]
    info = client.get(f"/object_info/{kind}")[kind]
    types = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    links = {n: v for n, v in prompt[number]["inputs"].items() if isinstance(v, list)}
    found: dict[int, Any] = {}
    for place, wanted in enumerate(info["output"]):
        fitting = [links[name] for name in links if types[name][0] == wanted]
        if fitting:
            found[place] = fitting[0]
    return found


@pytest.mark.parametrize("how", ["mute", "bypass"])
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case[2]} {case[1]}")
def test_a_graph_without_one_node(client: Client, case: tuple[str, str, str], how: str) -> None:
    name, number, _ = case
    prompt = quick(graph(client, name))
    passes = passed(client, prompt, number) if how == "bypass" else {}
    left = without(prompt, number, passes)
    try:
        outputs = client.queue(left, timeout=300)
    except PromptError as error:
        text = str(error)
        if "{" not in text:  # one of ours, with what to do
            assert "; " in text and ": " in text
            return
        said = json.loads(text[text.index("{") :])["node_errors"]
        missing = [e for node in said.values() for e in node["errors"]]
        assert missing and {e["type"] for e in missing} == {"required_input_missing"}
        assert all(e["extra_info"]["input_name"] for e in missing)
        return
    assert any("images" in output for output in outputs.values())


def test_a_muted_subject_leaves_the_others(client: Client) -> None:
    """Its mask stays behind in the router, and is left out."""
    prompt = quick(graph(client, "two_subjects_masks"))
    (router,) = (n for n in prompt.values() if n["class_type"] == "SubjectRouter")
    assert "mask_2" in router["inputs"]
    outputs = client.queue(without(prompt, router["inputs"]["subject_2"][0], {}), timeout=300)
    kinds = {prompt[number]["class_type"] for number in outputs}
    assert {"SaveImage", "RoutingMapPreview"} <= kinds
    texts = [text for output in outputs.values() for text in output.get("text", ())]
    assert "mask_2 is left out: subject_2 is missing or muted." in texts
