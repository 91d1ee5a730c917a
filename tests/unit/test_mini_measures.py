"""The evaluation's measures against values worked out by hand, and the finder's boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from lab.evaluation import measures, report, rows
from lab.evaluation.judge import Verdict
from lab.measuring import finder


def test_wilson_interval() -> None:
    # 95 % interval of 10 in 100: 5.52 % to 17.44 % (Wilson 1927, without continuity correction)
    estimate = measures.wilson(10, 100)
    assert estimate.value == 0.1 and estimate.count == 100
    assert abs(estimate.low - 0.05523) < 1e-4 and abs(estimate.high - 0.17437) < 1e-4
    assert measures.wilson(0, 10).low == 0
    assert measures.wilson(10, 10).high == pytest.approx(1)
    for successes, count in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="wilson"):
            measures.wilson(successes, count)


def test_bootstrap_interval() -> None:
    values = [0.0, 1.0] * 200
    estimate = measures.bootstrap(values)
    # the mean's standard error is 0.5 / sqrt(400) = 0.025; 2000 resamples know it to a few percent
    assert estimate.value == 0.5
    assert abs(estimate.high - estimate.low - 2 * 1.96 * 0.025) < 0.01
    assert measures.bootstrap(values) == estimate
    with pytest.raises(ValueError, match="no values"):
        measures.bootstrap([])


def unit(*angles: float) -> torch.Tensor:
    rows = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in angles]
    return torch.tensor(rows)


def test_names_and_blends() -> None:
    gallery = unit(0, 90, 180)
    assert measures.top1(unit(10, 100, 170), gallery) == [0, 1, 2]
    assert measures.all_found([2, 0, 5], [0, 2])
    assert not measures.all_found([2, 2, 0], [0, 2])  # found twice
    assert not measures.all_found([2], [0, 2])
    pair = unit(0, 90)
    assert not measures.blended(unit(10, 80), pair)
    assert not measures.blended(unit(80, 10), pair)  # each counts for the one it is like
    assert measures.blended(unit(30, 90), pair)  # nearer to the mixture at 45 degrees
    assert measures.blended(unit(45, 45), pair)


def test_assignment_uses_each_once() -> None:
    similarity = torch.tensor([[0.9, 0.8], [0.95, 0.1]])
    assert sorted(measures.assign(similarity)) == [(0, 1), (1, 0)]
    assert measures.assign(torch.tensor([[0.2, 0.7, 0.1]])) == [(0, 1)]
    assert measures.assign(torch.tensor([[0.2], [0.7]])) == [(1, 0)]


def test_iou_of_masks_and_grids() -> None:
    true = torch.zeros(2, 4, 4)
    true[0, :2], true[1, 2:, :2] = 1, 1
    found = torch.zeros(2, 4, 4)
    found[0, :2, :2], found[1, 2:, :2] = 1, 1
    assert measures.mean_iou(found, true) == (0.5 + 1) / 2
    maps = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert measures.grid_iou(maps, true, (2, 2)) == 1
    assert measures.grid_iou(maps.roll(1, dims=1), true, (2, 2)) < 0.5
    assert measures.mean_ceiling(true, (4, 4)) == 1
    assert measures.pose_matches(10, True, 4, True)
    assert not measures.pose_matches(10, True, 2, True)
    assert not measures.pose_matches(10, True, 10, False)


def test_report_is_a_table_per_group() -> None:
    figure = {"value": 0.412, "low": 0.369, "high": 0.456, "count": 500}
    rows = {
        "1 subject: full": {"samples": 500, "figures": {"identity top-1": figure}},
        "1 subject: base alone": {"samples": 500, "figures": {"background right": figure}},
        "routing at 500: full": {
            "samples": 9,
            "figures": {"over layers": figure, "layer 1": figure},
        },
    }
    text = report.markdown(rows)
    assert text.count("|---") > 3 and "| full | 41.2 % (36.9–45.6) |  | 500 |" in text
    assert "| base alone |  | 41.2 % (36.9–45.6) | 500 |" in text
    assert "routing, layer by layer | layer 1" in text
    assert report.slug("2 subjects: full, subjects' names") == "2_subjects_full_subjects_names"
    names = ["1 subject: full", "1 subject: full, routed everywhere", "2 subjects: full"]
    assert report.asked(names, ()) == names
    assert report.asked(names, ["1 subject"]) == names[:2]
    assert report.asked(names, ["2 sub", "1 subject: full"]) == [names[0], names[2]]
    with pytest.raises(ValueError, match="no row is called '4 subjects'; there are: 1 subject"):
        report.asked(names, ["1 subject", "4 subjects"])


def test_boxes_come_back_from_their_own_targets() -> None:
    """Perfect heat and distances give the boxes that they were made of."""
    mask = np.zeros((128, 128), bool)
    mask[20:70, 10:50] = True
    first = finder.box_of(mask)
    assert first == (10 / 128, 20 / 128, 50 / 128, 70 / 128)
    boxes = torch.tensor([[first, (0.55, 0.3, 0.95, 0.8), (-1.0, -1.0, -1.0, -1.0)]])
    heat, distances, inside = finder.targets(boxes)
    assert bool(inside.any()) and heat.shape == (1, 16, 16)
    peak = heat == torch.nn.functional.max_pool2d(heat[:, None], 3, 1, 1)[:, 0]
    found = finder._boxes(heat[0], distances[0], (peak & (heat > 0.5))[0])
    assert len(found) == 2
    for box in boxes[0, :2].tolist():
        assert max(finder.box_overlap(box, one.box) for one in found) > 0.999
    assert finder.box_overlap((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert finder.box_overlap((0, 0, 0.4, 1), (0.5, 0, 1, 1)) == 0


def test_outlines_are_also_told_by_what_they_are_ahead_of_another_subjects() -> None:
    def verdict(own: float, other: float | None) -> Verdict:
        return Verdict((), False, False, False, True, None, True, own, other)

    figures = rows.counted([verdict(0.8, 0.5), verdict(0.6, 0.7)], 1)
    assert figures["outline"].value == pytest.approx(0.7)
    assert figures["outline of another subject"].value == pytest.approx(0.6)
    assert figures["outline, own less another's"].value == pytest.approx(0.1)
    alone = rows.counted([verdict(0.8, None)], 1)  # a batch of one task has no other
    assert alone["outline"].value == 0.8 and "outline of another subject" not in alone
