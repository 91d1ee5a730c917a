"""From the recipe's folder to shipped files, and from them to a folder that training goes on in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from anystory_core.bases.sdxl.prediction import Prediction
from anystory_core.mini import weights
from anystory_core.mini.config import CONFIG
from anystory_core.tensor_files import read_tensors
from anystory_core.training.hosts.frozen import load_frozen
from anystory_core.training.initial import ROUTER_PARTS
from anystory_core.weights.checkpoint import load_model, save_model
from anystory_core.weights.model import PARTS, AnyStoryModel, build_model
from lab.evaluation.stack import stack_of_work
from lab.files import carried, export, shipped, start
from lab.files.folder import write_base_folder
from lab.files.half import write_half
from lab.measuring import finder, identity, outline
from lab.measuring import networks as measuring
from lab.networks import base, clip, vae
from lab.networks.telling import TaughtBase
from lab.networks.text import END, START
from lab.phase import Phase
from lab.stages import SUBJECT_FILE, stage1

IDS = [320, 537, START, END]


def save(phase: Phase, module: torch.nn.Module) -> None:
    state = module.state_dict()
    phase.folder.mkdir(exist_ok=True)
    torch.save({"weights": state, "average": state, "step": 3, "seconds": 0.0}, phase.state_file)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A recipe's folder after the base, with random weights."""
    torch.manual_seed(0)
    folder = tmp_path / "work"
    save(clip.phase(folder), clip.Clip(IDS))
    (folder / "vocabulary.json").write_text(json.dumps(IDS))
    save(base.phase(folder, 9), TaughtBase(base.build_unet(), CONFIG))
    base.write_prediction(folder, base.PREDICTION)
    torch.save(vae.build_vae().state_dict(), folder / "vae.whitened.pt")
    return folder


def ship(work: Path, files: Path) -> AnyStoryModel:
    """Write what export does, with an untrained AnyStory."""
    files.mkdir()
    for part, state in export.host_states(work).items():
        half = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
        save_file({n: t.contiguous() for n, t in half.items()}, files / f"{part}.safetensors")
    model = build_model(CONFIG)
    save_model(files / "anystory.safetensors", model, CONFIG, dtype=torch.float16)
    return model


@pytest.mark.parametrize("prediction", [Prediction(), Prediction("v", zero_snr=True)])
def test_what_the_base_predicts_goes_along(
    work: Path, tmp_path: Path, prediction: Prediction
) -> None:
    """From a folder to files, back to a folder, and to what the stages and the evaluation read."""
    base.write_prediction(work, prediction)
    files, again = tmp_path / "files", tmp_path / "again"
    ship(work, files)
    assert shipped.read_modules(files).prediction == prediction
    shipped.restore(again, files)
    assert stack_of_work(again).schedule.prediction == prediction
    settings = stage1(again, 1).base
    assert Path(settings.path) == write_base_folder(again)
    assert load_frozen(settings).prediction == prediction


def test_shipped_files_come_back_as_modules_and_as_a_folder(work: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    model = ship(work, files)
    modules = shipped.read_modules(files)
    assert modules.ids == IDS and modules.prediction == base.PREDICTION
    again = tmp_path / "again"
    shipped.restore(again, files)
    subject = load_model(again / SUBJECT_FILE)  # what stage 2 begins with
    assert subject.parts == tuple(part for part in PARTS if part not in ROUTER_PARTS)
    wanted = model.state_dict()
    assert all(torch.equal(t, wanted[n].half().float()) for n, t in subject.state_dict().items())
    first, _ = clip.load_clip(work)
    second, rows = clip.load_clip(again)
    assert int(rows[537]) == 2 and int(rows[1]) == 0
    for name, wanted, restored in (
        ("unet", base.load_unet(work), base.load_unet(again)),
        ("vae", vae.load_vae(work), vae.load_vae(again)),
        ("text", first.text, second.text),
        ("vision", first.vision, second.vision),
    ):
        state = restored.state_dict()
        for key, tensor in wanted.state_dict().items():
            kept = tensor.half().float() if tensor.is_floating_point() else tensor
            assert torch.equal(kept, state[key]), (name, key)
    for phase, done in (
        (vae.phase(again), True),
        (vae.decoder_phase(again), False),
        (clip.phase(again), True),
        (base.phase(again, 9), False),
    ):
        step = torch.load(phase.state_file, weights_only=True)["step"]
        assert step == (phase.steps if done else 0), phase.name
    with pytest.raises(ValueError, match="holds a trained base already"):
        shipped.restore(again, files)


def test_a_file_of_the_same_tensors_stays(tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    state = {"a": torch.randn(2, 3), "ids": torch.arange(3)}
    save_file({"a": state["a"].half(), "ids": state["ids"]}, file, metadata={"by": "another"})
    before = file.read_bytes()
    assert write_half(state, file) == len(before) and file.read_bytes() == before
    assert write_half({**state, "a": state["a"] + 1}, file) == file.stat().st_size
    assert torch.equal(read_tensors(file)["a"], (state["a"] + 1).half())
    write_half({"a": state["a"]}, file)
    assert set(read_tensors(file)) == {"a"}


def test_a_base_goes_on_elsewhere(work: Path, tmp_path: Path) -> None:
    """Its weights, its heads, its CLIP branch and what it predicts, in place of the shipped ones;
    and stage 1 then begins with that branch and a reference branch made from it."""
    files, again = tmp_path / "files", tmp_path / "again"
    base.write_prediction(work, Prediction())
    ship(work, files)
    torch.manual_seed(1)
    further = TaughtBase(base.build_unet(), CONFIG)
    save(base.phase(work, 9), further)
    base.write_prediction(work, base.PREDICTION)
    shipped.restore(again, files, carried.write_base(work))
    assert stack_of_work(again).schedule.prediction == base.PREDICTION
    found = base.phase(again, 9).final()
    for name, tensor in further.state_dict().items():
        assert torch.equal(found[name], tensor.half().float()), name
    begun = load_model(start.write_start(again))
    assert begun.parts == tuple(part for part in PARTS if part not in ROUTER_PARTS)
    unet = base.load_unet(again).state_dict()
    assert begun.reference_net is not None and begun.projections.clip is not None
    own = begun.reference_net.state_dict()["middle_block.0.in_layers.2.weight"]
    assert torch.equal(own, unet["mid_block.resnets.0.conv1.weight"])
    state = begun.state_dict()
    wanted = further.clip.state_dict()
    assert wanted and all(torch.equal(state[n], t.half().float()) for n, t in wanted.items())


def test_a_base_without_a_clip_branch_goes_on_with_the_shipped_one(
    work: Path, tmp_path: Path
) -> None:
    files, again = tmp_path / "files", tmp_path / "again"
    branch = ship(work, files).state_dict()
    tensors = read_tensors(carried.write_base(work))
    file = tmp_path / "old.safetensors"
    save_file({n: t for n, t in tensors.items() if not n.startswith("clip.")}, file)
    shipped.restore(again, files, file)
    found = base.load_base(again)
    own = found.clip.state_dict()
    assert own and all(torch.equal(t, branch[name].half().float()) for name, t in own.items())
    unet = base.load_unet(work).state_dict()
    assert all(torch.equal(t, unet[n].half().float()) for n, t in found.unet.state_dict().items())
    for lost in ("unet.conv_in.weight", "clip.projections.clip.1.to_k.weight"):
        save_file({n: t for n, t in tensors.items() if n != lost}, file)
        with pytest.raises(RuntimeError, match=rf"Missing key.*{lost}"):
            shipped.restore(tmp_path / "third", files, file)


def test_a_restored_phase_trains_on(work: Path) -> None:
    """A state without an optimiser, as :func:`restore` writes it, begins a new schedule."""
    module = torch.nn.Linear(2, 1)
    phase = Phase(name="line", folder=work, steps=2, learning_rate=0.1, seed=1)
    state = {k: torch.full_like(v, 0.5) for k, v in module.state_dict().items()}
    torch.save({"weights": state, "average": state, "step": 0, "seconds": 0.0}, phase.state_file)
    seen: list[float] = []

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        seen.append(float(module.bias.detach()))
        return module(torch.ones(1, 2)).square().sum()

    phase.run(module, loss_of)
    assert seen[0] == 0.5 and len(seen) == 2 and float(module.bias.detach()) < 0.5


def test_weights_that_are_there_are_not_written_again(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new version of the file costs the history its size."""
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "files")
    monkeypatch.setattr(export, "WHOLE_FILE", tmp_path / "trained.safetensors")
    torch.manual_seed(5)
    model = build_model(CONFIG)
    save_model(tmp_path / "trained.safetensors", model, CONFIG)
    export.export(work)
    file = weights.path("anystory")
    written = file.stat().st_mtime_ns
    assert export.export(work)["anystory"] == file.stat().st_size
    assert file.stat().st_mtime_ns == written
    next(iter(model.state_dict().values())).add_(1)
    save_model(tmp_path / "trained.safetensors", model, CONFIG)
    export.export(work)
    found = load_model(file, dtype=torch.float32).state_dict()
    assert all(torch.equal(found[n], t.half().float()) for n, t in model.state_dict().items())


def test_export_keeps_the_measuring_networks(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were trained, in half precision, once both of them are; they count for themselves."""
    monkeypatch.setattr(weights, "FOLDER", work / "files")
    monkeypatch.setattr(measuring, "FILE", work / "measuring.safetensors")
    monkeypatch.setattr(measuring, "OUTLINE_FILE", work / "outline.safetensors")
    shapes = outline.Segmenter()
    save(outline.phase(work), shapes)
    assert export.export(work)["outline"] < measuring.LARGEST_OUTLINE
    eyes = finder.Finder()
    save(finder.phase(work), eyes)
    assert "measuring" not in export.export(work)
    names = identity._Trained(7)
    names.state_dict()["network.trunk.0.1.running_mean"].fill_(0.25)
    save(identity.phase(work), names)
    sizes = export.export(work)
    assert sizes["measuring"] < measuring.LARGEST and set(sizes) == {
        *export.host_states(work),
        "outline",
        "measuring",
    }
    found, named = measuring.read_networks()
    outlined = measuring.read_segmenter()
    for kept, trained in ((found, eyes), (named, names.network), (outlined, shapes)):
        state = kept.state_dict()
        for key, tensor in trained.state_dict().items():
            assert torch.equal(
                state[key], tensor.half().float() if tensor.is_floating_point() else tensor
            )
        assert not kept.training and not any(p.requires_grad for p in kept.parameters())
