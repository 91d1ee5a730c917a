"""The mini text encoder's tokens: known words have rows, all others share row 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("open_clip")

from anystory_core.mini import weights
from anystory_core.mini.weights import full_table, pack_text, row_of_token
from anystory_core.story import parse_story
from devkit.graphs import FOLDER
from lab.networks.text import tokenize

GRAPHS = sorted((FOLDER / "api").glob("*.json"))


def test_rows_of_known_and_unknown_tokens() -> None:
    rows = row_of_token([5, 900, 49406, 49407])
    assert rows.shape == (49408,)
    assert rows[[5, 900, 49406, 49407]].tolist() == [1, 2, 3, 4]
    assert int((rows == 0).sum()) == 49408 - 4


def test_full_table_puts_every_row_at_its_token() -> None:
    name = "text_model.embeddings.token_embedding.weight"
    table = torch.arange(12.0).reshape(4, 3)
    packed = pack_text({name: table, "other": torch.ones(2)}, [7, 9, 49407])
    full = full_table(packed)
    assert set(full) == {name, "other"}
    assert torch.equal(full[name][[7, 9, 49407]], table[1:])
    assert torch.equal(full[name][8], table[0])
    assert full[name].shape == (49408, 3)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_templates_use_words_that_the_mini_model_knows(path: Path) -> None:
    """But for the names of the subjects, which are held out."""
    nodes = list(json.loads(path.read_text()).values())

    def texts(kind: str, name: str) -> list[str]:
        given: list[Any] = [n["inputs"][name] for n in nodes if n["class_type"] == kind]
        return [text for text in given if isinstance(text, str)]

    prompts = texts("CLIPTextEncode", "text")
    for script in texts("AnyStoryPanels", "script"):
        prompts += [panel.prompt for panel in parse_story(script).panels]
    labels = texts("EncodeSubject", "label")
    assert any(prompts) and labels
    known = set(load_file(weights.path("clip_text"))["token_ids"].tolist())
    for prompt in prompts:
        for label in labels:
            prompt = prompt.replace(label, "")
        assert set(tokenize([prompt])[0].tolist()) <= known, prompt
