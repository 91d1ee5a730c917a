"""What a batch of the base is made of: shares, who reads where, who is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from anystory_core.bases.sdxl.prediction import Kind, Prediction
from anystory_core.errors import ConfigError
from anystory_core.mini.config import CONFIG
from anystory_core.training.hosts.folder import folder_prediction
from anystory_core.training.schedule import Schedule
from lab.networks import base
from lab.networks.base import (
    PREDICTION,
    Picked,
    build_unet,
    level_weights,
    pick,
    train_base,
    write_prediction,
)
from lab.networks.cache import Cached, missing, numbers_of
from lab.networks.clip import Clip
from lab.networks.clip_branch import ClipBranch
from lab.networks.reading import Reader
from lab.networks.telling import TaughtBase

SCENES, MOST, SIDE, SMALL = 24, 3, 32, 16
WIDTH = CONFIG.unet.context_dim
EMPTY = torch.zeros(77, WIDTH).half(), torch.zeros(WIDTH).half()


def shard() -> Cached:
    """Scenes of none to three subjects, in turn; everything about scene s is the number s + 1, what
    is of its subject i a tenth of i more."""
    number = np.arange(1, SCENES + 1, dtype=np.float32)
    counts = np.arange(SCENES) % (MOST + 1)
    each = number[:, None] + np.arange(MOST, dtype=np.float32) / 10
    regions = np.zeros((SCENES, MOST, SIDE, SIDE), np.float16)
    for scene, count in enumerate(counts):
        for subject in range(count):
            regions[scene, subject, 10 * subject : 10 * subject + 8, 4:12] = 1

    def filled(values: np.ndarray, *shape: int) -> Tensor:
        there = values.reshape(*values.shape, *(1 for _ in shape))
        return torch.from_numpy(np.broadcast_to(there, (*values.shape, *shape)).astype(np.float16))

    return Cached(
        latents=filled(number, 4, SIDE, SIDE),
        references=filled(each, 4, SMALL, SMALL),
        seen=filled(each, CONFIG.clip.tokens, CONFIG.clip.width),
        regions=torch.from_numpy(regions),
        states=filled(np.stack((number, number), axis=1), 77, WIDTH),
        pooled=filled(np.stack((number, number), axis=1), WIDTH),
    )


@pytest.fixture(scope="module")
def batches() -> list[Picked]:
    rng = np.random.default_rng(0)
    return [pick([shard()], 16, EMPTY, rng) for _ in range(20)]


def scene_of(batch: Picked, row: int) -> int:
    return round(float(batch.latents[row, 0, 0, 0]))


def test_shares_of_a_batch(batches: list[Picked]) -> None:
    for batch in batches:
        assert len(batch.latents) == len(batch.states) == len(batch.pooled) == 16
        assert len(batch.places) == 8 and len(batch.references) == 12
        assert len(batch.subjects) == 14 and batch.told == slice(8, 14)
        assert len(batch.looks) == 6
        counts = batch.present.sum(dim=1)
        assert counts.min() >= 1
        assert counts[8:12].min() >= 2  # who is sent reads two at least
    counts = torch.cat([batch.present.sum(dim=1)[:8] for batch in batches])
    assert set(counts.tolist()) == {1, 2, 3}


def test_rows_belong_together(batches: list[Picked]) -> None:
    """References, places, looks and subjects of a row are those of its scene, in one order."""
    each = torch.tensor([0.0, 0.1, 0.2])
    for batch in batches:
        for row in range(14):
            scene = scene_of(batch, row)
            count = (scene - 1) % (MOST + 1)
            assert batch.present[row].tolist() == [i < count for i in range(MOST)]
            if row < 12:
                for found in (batch.references[row, :, 0, 0, 0], batch.seen[row, :, -1, -1]):
                    assert torch.allclose(found, scene + each, atol=0.02)  # float16 at 24
            if row >= 8:
                found = batch.looks[row - 8]
                assert torch.allclose(found, (scene + each)[:, None], atol=0.02)


def test_some_rows_have_no_tokens_and_the_others_those_of_all_that_are_there(
    batches: list[Picked],
) -> None:
    dropped = 0
    for batch in batches:
        present = batch.present[:12]
        without = ~batch.shown.any(dim=1)
        assert torch.equal(batch.shown[~without], present[~without])
        dropped += int(without.sum())
    assert 40 < dropped < 80  # a quarter of 240


def test_places_hold_their_subject_and_none_that_is_absent(batches: list[Picked]) -> None:
    everywhere = 0
    for batch in batches:
        places, subjects = batch.places, batch.subjects[:8]
        assert (places >= subjects).all()
        assert not places[~batch.present[:8]].any()
        full = places.flatten(2).amin(dim=2) == 1
        alone = batch.present[:8].sum(dim=1) == 1
        assert not full[~alone].any()
        everywhere += int(full.sum())
    assert everywhere > 5


def test_errors_count_more_inside_what_is_read(batches: list[Picked]) -> None:
    def inside(weights: Tensor, subjects: Tensor) -> Tensor:
        return weights[subjects > 0]

    for batch in batches:
        weights = batch.importance()[:, 0]
        union = batch.subjects.amax(dim=1)
        for row in range(12):
            least = inside(weights[row], union[row]).min()
            assert least > 2 * weights[row][union[row] == 0].max()
        assert torch.equal(weights[12:], torch.ones_like(weights[12:]))


def test_some_captions_are_dropped(batches: list[Picked]) -> None:
    empty = sum(int((batch.states.flatten(1).amax(dim=1) == 0).sum()) for batch in batches)
    assert 15 < empty < 55  # a tenth of 320


def test_errors_count_as_those_of_the_picture() -> None:
    """What v is wrong by, weighted, is what the picture is wrong by: once where there is noise
    alone, up to five times where there is less."""
    schedule, t = Schedule(PREDICTION), torch.tensor([999, 800, 400, 10])
    g = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    noisy, v = schedule.noisy(clean, noise, t), schedule.target(clean, noise, t)
    wrong = v + 0.1 * torch.randn(v.shape, generator=g, dtype=torch.float64)
    found, _ = schedule.parts(noisy, wrong, t)
    of_v = (wrong - v).square().mean((1, 2, 3)) * level_weights(schedule.snr(t), "v")
    of_picture = (found - clean).square().mean((1, 2, 3))
    counts = of_v / of_picture
    assert counts[0] == pytest.approx(1) and 1 < counts[1] < counts[2] <= 5.001
    assert counts[3] == pytest.approx(5, rel=1e-3)


def test_errors_of_the_noise_count_by_min_snr() -> None:
    assert level_weights(torch.tensor([0.01, 5.0, 20.0]), "epsilon").tolist() == [1, 1, 0.25]


def encode(folder: Path, number: int) -> None:
    for kind, tensor in vars(shard()).items():
        np.save(folder / "cache" / f"{number:05d}.{kind}.npy", tensor.numpy() / 30)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A recipe's folder before the base, with one shard."""
    torch.manual_seed(0)
    state = Clip([320, 537]).state_dict()
    whole = {"weights": state, "average": state, "step": 1, "seconds": 0.0}
    torch.save(whole, tmp_path / "clip.state.pt")
    (tmp_path / "vocabulary.json").write_text("[320, 537]")
    (tmp_path / "cache").mkdir()
    encode(tmp_path, 0)
    return tmp_path


@pytest.mark.parametrize("prediction", [None, Prediction(), Prediction("v")])
def test_a_base_learns_what_its_folder_says(
    work: Path, monkeypatch: pytest.MonkeyPatch, prediction: Prediction | None
) -> None:
    """A new one v; and noise levels, targets and weights are those of one kind."""
    schedules: list[Schedule] = []
    weighed = set[str]()

    class Kept(Schedule):
        def __init__(self, prediction: Prediction) -> None:
            super().__init__(prediction)
            schedules.append(self)

    def weights(snr: Tensor, kind: Kind) -> Tensor:
        weighed.add(kind)
        return level_weights(snr, kind)

    monkeypatch.setattr(base, "Schedule", Kept)
    monkeypatch.setattr(base, "level_weights", weights)
    if prediction is not None:
        write_prediction(work, prediction)
    wanted = prediction or PREDICTION
    train_base(work, steps=1, batch=8)
    assert [one.prediction for one in schedules] == [wanted] and weighed == {wanted.kind}
    assert folder_prediction(work) == wanted


def test_a_base_that_does_not_say_what_it_predicts_is_not_trained_on(work: Path) -> None:
    (work / "base.state.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="what its U-Net predicts"):
        train_base(work, steps=1)


def test_it_trains_and_goes_on_with_shards_that_were_added(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_LOOK_AGAIN", 1)
    torch.manual_seed(3)
    start = TaughtBase(build_unet(), CONFIG).state_dict()
    train_base(work, steps=1, batch=8)
    first = torch.load(work / "base.state.pt", weights_only=True)
    encode(work, 1)
    train_base(work, steps=2, batch=8)
    second = torch.load(work / "base.state.pt", weights_only=True)
    assert (first["step"], second["step"]) == (1, 2)
    for before, after in ((start, first["weights"]), (first["weights"], second["weights"])):
        still = [name for name in before if torch.equal(before[name], after[name])]
        assert not [name for name in still if name.startswith(("teller", "clip."))]
        assert len(still) < 0.2 * len(before)  # biases before norms may stay
    assert len((work / "base.csv").read_text().splitlines()) == 3


def test_in_some_steps_tokens_are_there_alone(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that is there then, and no reference is read."""
    read: list[tuple[bool, bool]] = []
    call, candidates = Reader.call, ClipBranch.candidates
    dropped: list[bool] = []

    def kept_candidates(branch: Any, seen: Tensor, zero: Tensor, shown: Tensor) -> Any:
        dropped.append(not shown.any(dim=1).all())
        return candidates(branch, seen, zero, shown)

    def kept_call(reader: Any, latents: Tensor | None, *rest: Any) -> Any:
        read.append((latents is None, dropped.pop()))
        return call(reader, latents, *rest)

    monkeypatch.setattr(base, "_TOKENS_ALONE", 2)
    monkeypatch.setattr(base, "DROP_CLIP", 1.0)
    monkeypatch.setattr(ClipBranch, "candidates", kept_candidates)
    monkeypatch.setattr(Reader, "call", kept_call)
    train_base(work, steps=3, batch=8)
    assert read == [(True, False), (False, True), (True, False)]


def test_a_shard_that_lacks_a_kind_is_not_read_and_is_encoded_again(
    work: Path, tmp_path: Path
) -> None:
    (tmp_path / "scenes").mkdir()
    for number in (0, 1):
        (tmp_path / "scenes" / f"{number:05d}.json").write_text("[]")
    encode(work, 1)
    (work / "cache" / "00001.seen.npy").unlink()
    assert numbers_of(work / "cache") == [0]
    assert missing(tmp_path / "scenes", work / "cache") == [1]


def test_without_cached_scenes_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"base: no shard in .*; run the phases world"):
        train_base(tmp_path, steps=1)
    assert not list(tmp_path.iterdir())
