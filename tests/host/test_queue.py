"""The real host process and its queue: every API graph, the same picture for the same seed, a bad
prompt in between, and memory over many runs."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import psutil
import pytest
from PIL import Image

from devkit.client import Client, PromptError
from devkit.graphs import INPUTS, LOADERS, Prompt, inputs_of, names, read_graph, with_loader
from devkit.host import Host

GRAPHS = [name for name in names(large=True) if not name.endswith("_flux")]
SDXL = [name for name in GRAPHS if name.endswith("_sdxl")]


def graph(client: Client, name: str) -> Prompt:
    """An API graph with its pictures uploaded."""
    prompt = read_graph(name)
    for inputs in inputs_of(prompt, "LoadImage"):
        inputs["image"] = client.upload(INPUTS / inputs["image"])
    return prompt


def quick(prompt: Prompt, *, seed: int | None = None, size: int = 128) -> Prompt:
    """The same graph with few steps of a small picture, and less guidance: at 5 two steps overshoot
    until a night is nothing but black."""
    prompt = copy.deepcopy(prompt)
    for inputs in inputs_of(prompt, "KSampler"):
        inputs["steps"], inputs["cfg"] = 2, 2.0
        if seed is not None:
            inputs["seed"] = seed
    for inputs in inputs_of(prompt, "EmptyLatentImage"):
        inputs["width"] = inputs["height"] = size
    return prompt


def pictures(client: Client, prompt: Prompt, kind: str = "SaveImage") -> list[np.ndarray]:
    """Run a prompt; what its nodes of a kind show."""
    outputs = client.queue(prompt, timeout=300)
    files = [
        file
        for number, output in outputs.items()
        if prompt[number]["class_type"] == kind
        for file in output["images"]
    ]
    return [np.asarray(Image.open(io.BytesIO(client.fetch(f))).convert("RGB")) for f in files]


def lacks_files_alone(client: Client, name: str) -> None:
    """The host finds nothing wrong with a graph but the names of model files that are not here."""
    with pytest.raises(PromptError) as caught:
        client.queue(graph(client, name))
    text = str(caught.value)
    said = json.loads(text[text.index("{") :])["node_errors"]
    assert {e["type"] for node in said.values() for e in node["errors"]} == {"value_not_in_list"}
    assert {node["class_type"] for node in said.values()} <= {kind for kind, _ in LOADERS}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_runs(client: Client, name: str) -> None:
    prompt = quick(graph(client, name))
    if name in SDXL:
        prompt = with_loader(prompt)
    size = {"hires_fix": 192, "segmentation": 320}.get(name, 128)
    kind = "PreviewImage" if name == "segmentation" else "SaveImage"
    shown = pictures(client, prompt, kind)
    assert len(shown) == {"story": 4, "segmentation": 2, "routes": 2}.get(name, 1)
    assert all(picture.shape == (size, size, 3) for picture in shown)
    assert kind == "PreviewImage" or all(picture.std() > 0 for picture in shown)


@pytest.mark.parametrize("name", SDXL)
def test_sdxl_graphs_lack_nothing_but_files(client: Client, name: str) -> None:
    """As saved, the host finds nothing wrong but the names of model files that are not here."""
    lacks_files_alone(client, name)


@pytest.mark.parametrize("name", SDXL)
def test_sdxl_graphs_are_the_mini_graphs_with_other_loaders(name: str) -> None:
    public = {
        "public_weights_sdxl": "two_subjects_masks",
        "public_mip_sdxl": "two_subjects_masks",
        "public_ms_diffusion_sdxl": "two_subjects_masks",
    }
    plain = public.get(name, name.removesuffix("_sdxl"))
    large, small = read_graph(name), read_graph(plain)
    kinds = [sorted(n["class_type"] for n in g.values()) for g in (with_loader(large), small)]
    assert kinds[0] == kinds[1]


def test_the_same_seed_gives_the_same_picture(client: Client) -> None:
    """Seeds A, B, A: the third prompt is not the cached first, and yet the same."""
    prompt = graph(client, "two_subjects")
    a, b, again = (pictures(client, quick(prompt, seed=seed))[0] for seed in (5, 6, 5))
    assert np.array_equal(a, again) and not np.array_equal(a, b)


def test_a_subject_is_encoded_once(client: Client) -> None:
    """With another seed alone, the host takes the encoded subjects from its cache."""
    prompt = graph(client, "two_subjects")
    for seed in (40, 41):
        client.queue(quick(prompt, seed=seed))
    entry = list(client.get("/history").values())[-1]
    (said,) = [data for event, data in entry["status"]["messages"] if event == "execution_cached"]
    cached = [prompt[number]["class_type"] for number in said["nodes"]]
    assert cached.count("EncodeSubject") == 2 and "KSampler" not in cached


def test_another_subject_gives_another_picture(client: Client) -> None:
    prompt = quick(graph(client, "two_subjects"), seed=5)
    (first,) = pictures(client, prompt)
    inputs_of(prompt, "LoadImage")[0]["image"] = client.upload(INPUTS / "anystory_parrot.png")
    (other,) = pictures(client, prompt)
    assert not np.array_equal(first, other)


def test_routes_are_shown(client: Client) -> None:
    shown = pictures(client, quick(graph(client, "two_subjects"), seed=8), "RoutingMapPreview")
    assert shown and all(p.std() > 0 for p in shown)


def test_a_bad_prompt_says_why_and_the_next_one_works(client: Client) -> None:
    good = quick(graph(client, "two_subjects"), seed=9)
    bad = copy.deepcopy(good)
    inputs_of(bad, "ApplyAnyStory")[0].update(start=0.9, end=0.1)
    with pytest.raises(PromptError, match="ApplyAnyStory: start: got 0.9, after end = 0.1"):
        client.queue(bad)
    bad = copy.deepcopy(good)
    for inputs in inputs_of(bad, "EncodeSubject"):
        inputs["mask_shows"] = "subject"
        inputs["mask"] = ["nothing", 0]
    bad["nothing"] = {
        "class_type": "SolidMask", "inputs": {"value": 0.0, "width": 256, "height": 256},
    }  # fmt: skip
    with pytest.raises(PromptError, match="EncodeSubject: mask: the mask of picture 1 is empty"):
        client.queue(bad)
    assert len(pictures(client, good)) == 1


def test_without_the_node_the_picture_is_plain_again(client: Client) -> None:
    """With, without, with, without, in one host: the plain pictures are equal, bit for bit."""
    prompt = quick(graph(client, "two_subjects"), seed=10)
    plain = copy.deepcopy(prompt)
    (sampler,) = inputs_of(plain, "KSampler")
    (apply,) = inputs_of(plain, "ApplyAnyStory")
    sampler["model"] = apply["model"]
    ours = ("ApplyAnyStory", "RoutingMapPreview", "SubjectRouter", "EncodeSubject", "LoadImage")
    plain = {n: node for n, node in plain.items() if node["class_type"] not in ours}
    (before,) = pictures(client, plain)
    (routed,) = pictures(client, prompt)
    other = quick(plain, seed=11)
    pictures(client, other)  # so that the next prompt is not the cached one
    (after,) = pictures(client, quick(plain, seed=10))
    assert np.array_equal(before, after) and not np.array_equal(before, routed)


def test_twenty_runs_keep_memory_flat(client: Client, host: Host) -> None:
    """Resident memory after run 20 is within 2 % of that after run 5."""
    prompt = graph(client, "two_subjects")
    process = psutil.Process(host.process.pid)
    resident: list[int] = []
    for seed in range(100, 120):
        client.queue(quick(prompt, seed=seed))
        resident.append(process.memory_info().rss)
    assert resident[-1] <= 1.02 * resident[4], [r >> 20 for r in resident]
