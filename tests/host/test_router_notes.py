"""What SubjectRouter says of masks and subjects that lead to nothing, and that a graph goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import Scene, halves
from torch import Tensor

EMPTY = torch.zeros(1, 64, 64)


def said(scene: Scene, mode: str, masks: list[Tensor | None], **subjects: Any) -> list[str]:
    given = {f"subject_{i}": s for i, s in enumerate(scene.subjects[: len(masks)], 1)}
    given |= {f"mask_{i}": m for i, m in enumerate(masks, 1) if m is not None}
    given |= {"clip": scene.mini.clip, **subjects}
    out = scene.pack.SubjectRouter.execute(anystory=scene.mini.anystory, mode=mode, **given)
    return list(out.ui["text"])


@pytest.mark.parametrize("mode", ["masks", "learned within masks", "text within masks"])
def test_masks_that_give_a_subject_nothing(scene: Scene, mode: str) -> None:
    left, right = halves()
    assert said(scene, mode, [left, right]) == []
    (text,) = said(scene, mode, [left, EMPTY])
    assert text.startswith("Subject 2 ('box') gets no place: mask_2 is empty")
    (text,) = said(scene, mode, [0.43 * left, right])
    assert "Subject 1 ('ball') gets no place: mask_1 is nowhere above 0.5" in text
    assert "its highest value is 0.43" in text
    assert said(scene, mode, [0.5 * left, right]) == []


def test_modes_without_masks_say_nothing_of_them(scene: Scene) -> None:
    assert said(scene, "learned", [EMPTY, EMPTY]) == []


@pytest.mark.parametrize("size", [64, 48])
def test_a_mask_under_another(scene: Scene, size: int) -> None:
    """At a tie the lower number wins; where masks only limit the router they may be equal."""
    left = halves()[0]
    second = halves(size)[0]
    (text,) = said(scene, "masks", [left, second])
    assert text.startswith("Subject 2 ('box') gets no place: mask_2 lies wholly under mask_1")
    assert said(scene, "learned within masks", [left, second]) == []
    (text,) = said(scene, "masks", [0.6 * left, second])
    assert text.startswith("Subject 1 ('ball') gets no place: mask_1 lies wholly under mask_2")
    grown = torch.cat((second, torch.ones_like(second)), dim=1)
    assert said(scene, "masks", [left, grown]) == []


def test_a_lost_subject_is_counted_in_every_picture(scene: Scene) -> None:
    """A mask that is empty in one picture of a batch only loses no subject."""
    left, right = halves()
    some = torch.cat((EMPTY, right))
    assert said(scene, "masks", [left, some]) == []
    (text,) = said(scene, "masks", [left, torch.cat((EMPTY, EMPTY))])
    assert "mask_2 is empty" in text


@pytest.mark.parametrize("mode", ["learned", "masks"])
def test_the_mask_of_a_muted_subject_is_left_out(scene: Scene, mode: str) -> None:
    """Muting Encode Subject takes its subject away and leaves its mask."""
    left, right = halves()
    inputs = {"subject_1": scene.subjects[0], "mask_1": left, "mask_2": right}
    out = scene.pack.SubjectRouter.execute(anystory=scene.mini.anystory, mode=mode, **inputs)
    assert list(out.ui["text"]) == ["mask_2 is left out: subject_2 is missing or muted."]
    one = scene.route(scene.subjects[0], mode=mode, masks=[left])
    assert torch.equal(
        scene.sample(scene.apply(routing=out.args[0]), steps=1),
        scene.sample(scene.apply(routing=one), steps=1),
    )


def test_the_numbers_are_those_of_the_inputs(scene: Scene) -> None:
    inputs = {"subject_2": scene.subjects[0], "mask_2": halves()[0]}
    inputs |= {"subject_5": scene.subjects[1], "mask_5": EMPTY}
    out = scene.pack.SubjectRouter.execute(anystory=scene.mini.anystory, mode="masks", **inputs)
    (text,) = out.ui["text"]
    assert text.startswith("Subject 5 ('box') gets no place: mask_5 is empty")
