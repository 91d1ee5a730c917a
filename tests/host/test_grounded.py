"""Weights whose tokens know the subject's name and place (MS-Diffusion), in the host."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from public_weights import ms_diffusion_state, save_pickle
from scene import Scene, halves, module
from torch import Tensor

CORE = "anystory_pack.anystory_core"
PHRASE = 256  # of the mini model's text encoder


@pytest.fixture(scope="module")
def anystory(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """MS-Diffusion's layout at the mini model's sizes, converted and loaded as the nodes do."""
    folder: Path = tmp_path_factory.mktemp("grounded")
    config = scene.mini.anystory.model.config
    sizes = module(f"{CORE}.training.hosts.sizes")
    with torch.device("meta"):
        unet = module("diffusers").UNet2DConditionModel(**sizes.diffusers_unet_config(config.unet))
    state = ms_diffusion_state(list(unet.attn_processors), config, phrase=PHRASE)
    file = save_pickle(folder / "ms_adapter.bin", state)
    convert = module(f"{CORE}.weights.convert.conversion").convert
    out = folder / "a.safetensors"
    convert(None, file, out, config=config, reference_net="none", dtype=torch.float32)
    managed = module("anystory_pack.nodes.host.managed")
    loaded = module(f"{CORE}.weights.checkpoint").load_model(out, operations=managed.OPERATIONS)
    return managed.ManagedAnyStory(loaded, "a.safetensors")


def subjects_of(scene: Scene, anystory: Any, clip: Any) -> list[Any]:
    return [
        scene.encode(number, anystory=anystory, label=label, clip=clip)
        for number, label in enumerate(("ball", "box"))
    ]


def drawn(scene: Scene, anystory: Any, subjects: list[Any], masks: list[Tensor]) -> Tensor:
    """One step; the model's own unconditional rows are part of it."""
    inputs = {f"subject_{i}": s for i, s in enumerate(subjects, 1)}
    inputs |= {f"mask_{i}": m for i, m in enumerate(masks, 1)}
    routing = scene.pack.SubjectRouter.execute(anystory=anystory, mode="masks", **inputs).args[0]
    return scene.sample(scene.apply(routing=routing), steps=1)


def test_tokens_are_made_for_the_places(scene: Scene, anystory: Any) -> None:
    """A run equals one whose subjects came with the tokens of their boxes; and other boxes make
    other tokens, where the regions are the same."""
    subjects, masks = subjects_of(scene, anystory, scene.mini.clip), halves()
    assert all(s.background_tokens is None and s.states is not None for s in subjects)
    assert all(s.phrase.shape == (PHRASE,) for s in subjects)
    first = drawn(scene, anystory, subjects, masks)
    assert torch.equal(first, drawn(scene, anystory, subjects, masks))
    grounding = module(f"{CORE}.subject.grounding")
    ready = [
        dataclasses.replace(s, states=None, phrase=None)
        for s in grounding.ground_subjects(
            anystory.model, "masks", subjects, [mask[0] for mask in masks]
        )
    ]
    assert torch.allclose(first, drawn(scene, anystory, ready, masks), atol=1e-4)
    ungrounded = [dataclasses.replace(s, states=None, phrase=None) for s in subjects]
    assert not torch.allclose(first, drawn(scene, anystory, ungrounded, masks), atol=1e-3)


def test_a_label_and_its_clip_are_needed(scene: Scene, anystory: Any) -> None:
    error = scene.errors.AnyStoryError
    unnamed = subjects_of(scene, anystory, None)
    with pytest.raises(error, match=r"SubjectRouter: mode 'masks': .*subject \[1, 2\] has none"):
        drawn(scene, anystory, unnamed, halves())
    other = SimpleNamespace(cond_stage_model=SimpleNamespace(), tokenize=lambda text: {"g": []})
    with pytest.raises(error, match="EncodeSubject: clip: it has no CLIP-L"):
        subjects_of(scene, anystory, other)


def test_another_picture_encoder_is_named(scene: Scene, anystory: Any) -> None:
    """The sizes of what is connected and of what the file wants."""
    model = anystory.model
    big = dataclasses.replace(model.config.clip, width=1664, layers=48)
    config = dataclasses.replace(model.config, clip=big)
    clip_states = module("anystory_pack.nodes.host.sdxl.encode").clip_states
    with pytest.raises(
        scene.errors.ModelMismatchError, match=r"\(192, 6, 224\).*\(1664, 48, 224\)"
    ):
        clip_states(scene.mini.clip_vision, torch.zeros(1, 3, 224, 224), config)


def test_the_phrase_is_clips_unprojected_pooled_state(scene: Scene, tmp_path: Path) -> None:
    """As transformers' ``pooler_output``, although the file has a projection that is no identity;
    and the host's own text states are not changed by it."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "max_position_embeddings": 77, "vocab_size": 49408,
        "hidden_act": "quick_gelu", "projection_dim": 32, "eos_token_id": 49407,
    }  # fmt: skip
    file = tmp_path / "clip.json"
    file.write_text(json.dumps(sizes))
    host = module("comfy.sd1_clip")
    torch.manual_seed(3)
    small = host.SDClipModel(layer="hidden", layer_idx=-2, textmodel_json_config=str(file))
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = host.SDTokenizer()
    clip = SimpleNamespace(
        cond_stage_model=SimpleNamespace(clip_l=small),
        tokenize=lambda text: {"l": tokenizer.tokenize_with_weights(text)},
        load_model=lambda: None,
    )
    texts, errors = module("anystory_pack.nodes.host.texts"), scene.errors
    tokens = tokenizer.tokenize_with_weights("a red fox")
    with torch.no_grad():
        before = small.encode_token_weights(tokens)
        got = texts.encode_phrase(clip, "a red fox", 32)
        after = small.encode_token_weights(tokens)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    transformers = module("transformers")
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)).eval()
    state = {k.removeprefix("transformer."): v for k, v in small.state_dict().items()}
    flat = "" if hasattr(theirs, "text_model") else "text_model."
    wanted = theirs.state_dict()
    theirs.load_state_dict({k: state[flat + k] for k in wanted if flat + k in state}, strict=False)
    assert all(flat + k in state for k in wanted if "position_ids" not in k)
    ids = torch.tensor([[entry[0] for entry in tokens[0]]])
    with torch.no_grad():
        expected = theirs(ids).pooler_output[0]
    assert torch.allclose(got, expected, atol=1e-4)  # float32, sums in another order
    assert not torch.allclose(before[1][0], expected, atol=1e-2)  # the projected one
    with pytest.raises(errors.ModelMismatchError, match="gives 32 numbers .* expect 768"):
        texts.encode_phrase(clip, "a red fox", 768)
