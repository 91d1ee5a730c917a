"""The mini model through the public layouts, on random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from PIL import Image, ImageDraw

from anystory_core.errors import CheckpointError
from anystory_core.mini.config import CONFIG
from anystory_core.mini.weights import row_of_token
from anystory_core.weights.model import AnyStoryModel, build_model
from lab.evaluation import draw, rows
from lab.evaluation.bench import Bench
from lab.evaluation.draw import Encoder, Variant
from lab.evaluation.judge import Judge
from lab.evaluation.stack import Stack, make_stack
from lab.evaluation.tasks import Task, task
from lab.files.public import adapter_state, converted
from lab.networks.clip import Clip
from lab.networks.text import END, START
from lab.networks.vae import build_vae
from lab.world.emoji import Emoji

PARTS = ("subject_encoder", "clip_projections")


@pytest.fixture(scope="module")
def stack() -> Stack:
    from lab.networks.base import PREDICTION, build_unet

    torch.manual_seed(0)
    ids = [320, 537, 593, 2308, 2442, START, END]  # a, in, red, box, ball
    clip = Clip(ids)
    rows = row_of_token(ids)
    return make_stack(build_unet(), build_vae(), clip.text, rows, clip.vision, PREDICTION)


@pytest.fixture(scope="module")
def branch() -> AnyStoryModel:
    """A CLIP branch alone, as ``no_reference`` trains it."""
    torch.manual_seed(1)
    return build_model(CONFIG, PARTS)


def bench(stack: Stack, models: dict[str, AnyStoryModel]) -> Bench:
    judge = Judge.load(())
    return Bench(stack, models, judge, judge)


@pytest.fixture(scope="module")
def models(stack: Stack, branch: AnyStoryModel) -> dict[str, AnyStoryModel]:
    return bench(stack, {"no reference": branch}).converted


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Emoji]:
    folder = tmp_path_factory.mktemp("subjects")
    out = []
    for name, colour in (("box", (230, 30, 30)), ("ball", (40, 60, 230))):
        picture = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(picture).rectangle((20, 60, 236, 196), fill=(*colour, 255))
        picture.save(folder / f"{name}.png")
        out.append(Emoji(name, name, name, folder / f"{name}.png"))
    return out


def drawn(stack: Stack, tasks: list[Task], variant: Variant) -> torch.Tensor:
    return draw.draw(stack, tasks, [t.caption("named") for t in tasks], variant, steps=2)


def test_tensors_arrive_where_they_belong(
    stack: Stack, branch: AnyStoryModel, models: dict[str, AnyStoryModel]
) -> None:
    """The CLIP branch comes back whole; reference maps are the block's own self-attention's."""
    assert models.keys() == {"converted simplified", "converted original", "converted none"}
    for kind, model in models.items():
        state = model.state_dict()
        assert all(torch.equal(state[name], x) for name, x in branch.state_dict().items())
        if kind == "converted none":
            assert state.keys() == branch.state_dict().keys()
            continue
        for site in model.sites[1:]:
            block = stack.unet.get_submodule(site.diffusers)
            given = state[f"projections.reference.{site.index}.to_v.weight"]
            assert torch.equal(given, block.attn1.to_v.weight)
            own = f"reference_net.{site.ldm}.attn2.to_k.weight"
            there = own in state and torch.equal(state[own], block.attn2.to_k.weight)
            assert there == (kind == "converted original" and site != model.sites[-1])
        first = state["reference_net.input_blocks.0.0.weight"]
        assert torch.equal(first[:, :4], stack.unet.conv_in.weight) and not first[:, 4:].any()


def test_without_references_it_draws_as_the_branch(
    stack: Stack,
    branch: AnyStoryModel,
    models: dict[str, AnyStoryModel],
    subjects: list[Emoji],
) -> None:
    tasks = [task(subjects, 1, 3)]
    plain, *others = (
        drawn(stack, tasks, Variant(models[f"converted {kind}"]))
        for kind in ("none", "simplified", "original")
    )
    assert torch.equal(plain, drawn(stack, tasks, Variant(branch)))
    assert all((plain - other).abs().mean() > 1e-4 for other in others)
    assert (others[0] - others[1]).abs().mean() > 1e-4


def test_the_original_net_reads_the_label(
    stack: Stack, models: dict[str, AnyStoryModel], subjects: list[Emoji]
) -> None:
    renamed = [Emoji(s.code, "red ball", "red ball", s.file) for s in subjects]
    same = {}
    for kind in ("simplified", "original"):
        encoder = Encoder(stack, models[f"converted {kind}"])
        (a,), (b,) = (encoder.subjects(task(given, 1, 5)) for given in (subjects, renamed))
        assert a.label in ("box", "ball") and b.label == "red ball"
        same[kind] = all(torch.equal(x, y) for x, y in zip(a.features, b.features, strict=True))
    assert same == {"simplified": True, "original": False}


def test_words_route_one_task_at_a_time(
    stack: Stack, models: dict[str, AnyStoryModel], subjects: list[Emoji]
) -> None:
    tasks = [task(subjects, 2, n) for n in range(2)]
    model = models["converted none"]
    variant = Variant(model, "text")
    by_words = drawn(stack, tasks[:1], variant)
    assert torch.equal(by_words, drawn(stack, tasks[:1], variant))
    assert (by_words - drawn(stack, tasks[:1], Variant(model, "masks"))).abs().mean() > 1e-4
    with pytest.raises(ValueError, match="too many values"):
        drawn(stack, tasks, variant)


def test_rows_name_models_that_can_be_there(
    stack: Stack, branch: AnyStoryModel, models: dict[str, AnyStoryModel]
) -> None:
    assert bench(stack, {}).converted == {}
    full = build_model(CONFIG)
    from_full = bench(stack, {"full": full}).converted["converted none"].state_dict()
    assert torch.equal(
        from_full["encoder.subject.latents"], full.state_dict()["encoder.subject.latents"]
    )
    without = {"real", "base", "full", "no clip", "no reference"}
    wanted = {row.model for row in rows.DRAWN} - without
    assert wanted == models.keys()
    assert {row.routes for row in rows.DRAWN if row.model in models} == {"single", "masks", "text"}


def test_weights_without_a_clip_branch_are_refused(stack: Stack, tmp_path: Path) -> None:
    model = build_model(CONFIG, ("reference_net", "reference_projections"))
    with pytest.raises(CheckpointError, match="hold no CLIP branch"):
        adapter_state(model)
    with pytest.raises(CheckpointError, match="hold no CLIP branch"):
        converted(stack.unet, model)
