"""FLUX in the real host process and its queue: a tiny model in the place of the templates'
files."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import psutil
import pytest
from test_queue import graph, lacks_files_alone, pictures

from devkit.client import Client, PromptError
from devkit.graphs import Prompt, inputs_of, names, read_graph, with_loader
from devkit.host import Host

GRAPHS = [name for name in names(large=True) if name.endswith("_flux")]
# Those that only FLUX's graphs have, beside what the mini graphs have too.
OWN = {"FluxGuidance", "ModelSamplingFlux", "T5TokenizerOptions", "EmptySD3LatentImage"}


def tiny(
    client: Client, name: str, *, steps: int = 4, seed: int | None = None, size: int = 128
) -> Prompt:
    """A graph for FLUX with the tiny model, few steps and a small picture."""
    prompt = with_loader(graph(client, name), "LoadTinyFlux")
    for inputs in inputs_of(prompt, "KSampler"):
        inputs["steps"] = steps
        if seed is not None:
            inputs["seed"] = seed
    for kind in ("EmptySD3LatentImage", "ModelSamplingFlux"):
        for inputs in inputs_of(prompt, kind):
            inputs["width"] = inputs["height"] = size
    return prompt


def without_subjects(prompt: Prompt) -> Prompt:
    """The same graph without our nodes."""
    plain = copy.deepcopy(prompt)
    (sampler,), (apply,) = inputs_of(plain, "KSampler"), inputs_of(plain, "ApplyAnyStory")
    sampler["model"] = apply["model"]
    ours = ("ApplyAnyStory", "RoutingMapPreview", "SubjectRouter", "EncodeSubject", "LoadImage")
    return {n: node for n, node in plain.items() if node["class_type"] not in ours}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_runs(client: Client, name: str) -> None:
    shown = pictures(client, tiny(client, name))
    assert len(shown) == (4 if name == "story_flux" else 1)
    assert all(picture.shape == (128, 128, 3) and picture.std() > 0 for picture in shown)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_lack_nothing_but_files(client: Client, name: str) -> None:
    """As saved, the host finds nothing wrong but the names of model files that are not here."""
    lacks_files_alone(client, name)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_have_the_authors_settings(name: str) -> None:
    prompt = read_graph(name)
    (sampler,), (shift,) = inputs_of(prompt, "KSampler"), inputs_of(prompt, "ModelSamplingFlux")
    (latent,) = inputs_of(prompt, "EmptySD3LatentImage")
    assert (sampler["steps"], sampler["cfg"]) == (25, 1.0)
    assert (sampler["sampler_name"], sampler["scheduler"]) == ("euler", "simple")
    assert (shift["max_shift"], shift["base_shift"]) == (1.15, 0.5)
    assert {shift["width"], shift["height"], latent["width"], latent["height"]} == {512}
    assert [i["guidance"] for i in inputs_of(prompt, "FluxGuidance")] == [3.5]
    assert [i["min_length"] for i in inputs_of(prompt, "T5TokenizerOptions")] == [512]
    (apply,) = inputs_of(prompt, "ApplyAnyStory")
    timing = [apply[name] for name in ("concept_start", "concept_end", "reference_start")]
    assert timing == [0.1, 0.3, -1.0]
    mini = {n["class_type"] for n in read_graph(name.removesuffix("_flux")).values()}
    own = {n["class_type"] for n in with_loader(prompt).values()}
    assert own - OWN <= mini


def test_nothing_active_is_no_pack(client: Client) -> None:
    """With, without, at strength 0, without, in one host: all but the first are equal to the
    bit."""
    prompt = tiny(client, "two_subjects_flux", seed=10)
    plain, idle = without_subjects(prompt), copy.deepcopy(prompt)
    inputs_of(idle, "ApplyAnyStory")[0].update(strength=0.0, reference_strength=0.0)
    (routed,) = pictures(client, prompt)
    (before,) = pictures(client, plain)
    (quiet,) = pictures(client, idle)
    pictures(client, tiny(client, "two_subjects_flux", seed=11))
    (sampler,) = inputs_of(plain, "KSampler")
    sampler["seed"] = 12
    pictures(client, plain)
    sampler["seed"] = 10
    (after,) = pictures(client, plain)
    assert np.array_equal(before, after) and np.array_equal(before, quiet)
    assert not np.array_equal(before, routed)


def test_apply_twice_gives_the_same(client: Client) -> None:
    """Two Apply nodes on one model, one after the other and each with a sampler."""
    prompt = tiny(client, "two_subjects_flux", seed=13)
    (apply,) = (n for n, node in prompt.items() if node["class_type"] == "ApplyAnyStory")
    (sampler,) = (n for n, node in prompt.items() if node["class_type"] == "KSampler")
    (decode,) = (n for n, node in prompt.items() if node["class_type"] == "VAEDecode")
    (save,) = (n for n, node in prompt.items() if node["class_type"] == "SaveImage")
    for number in (apply, sampler, decode, save):
        prompt[f"{number}0"] = copy.deepcopy(prompt[number])
    prompt[f"{apply}0"]["inputs"]["end"] = 0.999  # another input, or the host makes one node of two
    prompt[f"{sampler}0"]["inputs"]["model"] = [f"{apply}0", 0]
    prompt[f"{decode}0"]["inputs"]["samples"] = [f"{sampler}0", 0]
    prompt[f"{save}0"]["inputs"]["images"] = [f"{decode}0", 0]
    first, second = pictures(client, prompt)
    assert np.array_equal(first, second)


def test_a_cancelled_run_leaves_nothing(client: Client) -> None:
    prompt = tiny(client, "two_subjects_flux", seed=14)
    (expected,) = pictures(client, prompt)
    long = tiny(client, "two_subjects_flux", seed=15, steps=1000)
    reached: list[int] = []

    def interrupt(kind: str, value: int, most: int) -> None:
        if kind == "KSampler" and most == 1000 and value > 2:
            reached.append(value)
            client.post("/interrupt", {})

    with pytest.raises(PromptError, match="interrupted"):
        client.queue(long, interrupt, timeout=300)
    assert reached and reached[-1] < 900
    pictures(client, tiny(client, "two_subjects_flux", seed=16))
    (again,) = pictures(client, prompt)
    assert np.array_equal(expected, again)


def test_a_bad_prompt_says_why_and_the_next_one_works(client: Client) -> None:
    good = tiny(client, "single_subject_flux", seed=17)
    bad: Any = copy.deepcopy(good)
    inputs_of(bad, "ApplyAnyStory")[0].update(concept_start=0.5, concept_end=0.1)
    with pytest.raises(PromptError, match="ApplyAnyStory: concept_start: got 0.5, after"):
        client.queue(bad)
    bad = copy.deepcopy(good)
    bad["sdxl"] = {"class_type": "LoadAnyStoryMini", "inputs": {}}
    inputs_of(bad, "ApplyAnyStory")[0]["model"] = ["sdxl", 0]
    with pytest.raises(PromptError, match="no blocks of FLUX's kind"):
        client.queue(bad)
    assert len(pictures(client, good)) == 1


def test_routes_are_shown(client: Client) -> None:
    prompt = tiny(client, "two_subjects_flux", seed=18)
    shown = pictures(client, prompt, "RoutingMapPreview")
    assert len(shown) == 2 and all(picture.std() > 0 for picture in shown)


def test_twenty_runs_keep_memory_flat(client: Client, host: Host) -> None:
    """Resident memory after run 20 is within 2 % of that after run 5."""
    process = psutil.Process(host.process.pid)
    resident: list[int] = []
    for seed in range(100, 120):
        client.queue(tiny(client, "two_subjects_flux", seed=seed))
        resident.append(process.memory_info().rss)
    assert resident[-1] <= 1.02 * resident[4], [r >> 20 for r in resident]
