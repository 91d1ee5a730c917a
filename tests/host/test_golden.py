"""Saved graphs must stay readable: ids, inputs and outputs never change or move; new inputs come
last."""

from __future__ import annotations

from types import ModuleType

import pytest

PAIRS = [f"{kind}_{n}" for n in range(1, 9) for kind in ("subject", "mask")]
OPTIONS = ["strength", "reference_strength", "start", "end"]
TIMING = ["concept_start", "concept_end", "reference_start"]
GOLDEN: dict[str, tuple[list[str], list[str]]] = {
    "LoadAnyStoryMini": ([], ["MODEL", "CLIP", "VAE", "CLIP_VISION", "ANYSTORY"]),
    "LoadAnyStory": (["anystory_name"], ["ANYSTORY"]),
    "EncodeSubject": (
        [
            "anystory", "clip_vision", "vae", "image", "mask", "invert_mask", "label", "clip",
            "mask_shows",
        ],
        ["ANYSTORY_SUBJECT"],
    ),
    "AnyStorySubjectOptions": (
        ["subject", *OPTIONS, "strength_at_start", "strength_at_end", "easing"],
        ["ANYSTORY_SUBJECT"],
    ),
    "AnyStorySplitMasks": (["masks", "order"], ["MASK"] * 8),
    "SubjectRouter": (
        ["anystory", "mode", *PAIRS, "clip", "agreement", "text_block"], ["ANYSTORY_ROUTING"],
    ),
    "ApplyAnyStory": (
        [
            "model", "routing", *OPTIONS, "references_in_uncond", "references", *TIMING,
            "matched_start", "matched_end",
        ],
        ["MODEL", "ANYSTORY_MAPS"],
    ),
    "RoutingMapPreview": (
        ["maps", "latent", "steps", "batch_index", "show_background", "image"], ["IMAGE", "MASK"],
    ),
    "AnyStorySegment": (
        ["model", "vae", "image", "routing", "noise", "noises", "seed", "positive"], ["MASK"],
    ),
    "SaveAnyStorySubject": (["subject", "name", "place", "overwrite"], ["ANYSTORY_SUBJECT"]),
    "LoadAnyStorySubject": (["anystory", "subject_name", "clip_vision"], ["ANYSTORY_SUBJECT"]),
    "AnyStoryPanels": (["routing", "script", "seed"], ["STRING", "ANYSTORY_ROUTING", "INT"]),
    "BuildAnyStory": (
        ["checkpoint", "ip_adapter", "name", "reference_net", "precision", "references"],
        ["STRING"],
    ),
    "BuildAnyStoryFlux": (["anystory_flux", "redux", "name", "mixed_ranks"], ["STRING"]),
}  # fmt: skip


def test_every_node_is_listed(pack: ModuleType) -> None:
    assert [node.define_schema().node_id for node in pack.NODES] == list(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_and_order(pack: ModuleType, name: str) -> None:
    schema = next(n for n in pack.NODES if n.__name__ == name).define_schema()
    inputs, outputs = GOLDEN[name]
    assert [entry.id for entry in schema.inputs] == inputs
    assert [entry.get_io_type() for entry in schema.outputs] == outputs
