"""A file that the trainer exported runs the bundled graph in the real host."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.data import shards
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer
from devkit import environment
from devkit.client import Client
from devkit.graphs import INPUTS, read_graph
from devkit.host import running


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of each stage at the mini sizes, on a random base: a whole AnyStory file."""
    folder = tmp_path_factory.mktemp("mini")
    tiny.write_base(folder / "base", model=AnyStoryConfig.mini())
    shards.write_folder(tiny.pairs(2), folder / "pairs")
    shards.write_folder(tiny.scenes(2), folder / "scenes")
    file = None
    for stage, data in (("subject", "pairs"), ("router", "scenes")):
        tables: dict[str, Any] = {"run": {"batch": 1}, "data": {"resolution": 64}}
        if file is not None:
            tables["router"] = {"subject_file": str(file)}
        file = Trainer(
            load_config(
                tiny.run_toml(
                    folder / stage, folder / "base", folder / data, stage, steps=1, **tables
                )
            )
        ).run()
    assert file is not None
    return file


def test_the_bundled_graph_runs_on_it(trained: Path, tmp_path: Path) -> None:
    """A file of the mini model's sizes draws a picture; one of toy sizes is read and described."""
    prompt = read_graph("two_subjects")
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if value == ["1", 4]:  # the mini loader's ANYSTORY
                node["inputs"][name] = ["loaded", 0]
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=128, height=128)
    prompt["loaded"] = {
        "class_type": "LoadAnyStory", "inputs": {"anystory_name": "trained.safetensors"},
    }  # fmt: skip
    models = tmp_path / "models" / "anystory"
    models.mkdir(parents=True)
    (models / "trained.safetensors").write_bytes(trained.read_bytes())
    tiny.write_weights(models / "toy.safetensors")
    with running(environment.prepare_host(), environment.python(), tmp_path) as host:
        client = Client(host.url)
        for node in prompt.values():
            if node["class_type"] == "LoadImage":
                node["inputs"]["image"] = client.upload(INPUTS / node["inputs"]["image"])
        outputs = client.queue(prompt, timeout=300)
        (file,) = next(
            out["images"] for n, out in outputs.items() if prompt[n]["class_type"] == "SaveImage"
        )
        toy = client.queue(
            {
                "toy": {
                    "class_type": "LoadAnyStory",
                    "inputs": {"anystory_name": "toy.safetensors"},
                },
                "shown": {"class_type": "PreviewAny", "inputs": {"source": ["toy", 0]}},
            },
            timeout=300,
        )
        picture = np.asarray(Image.open(io.BytesIO(client.fetch(file))))
    assert picture.shape == (128, 128, 3) and picture.std() > 0
    (text,) = outputs["loaded"]["text"]
    assert "trained.safetensors (mini)" in text and "router" in text and "No router" not in text
    (text,) = toy["toy"]["text"]
    assert "toy.safetensors (tiny)" in text and "router" in text and "No router" not in text
