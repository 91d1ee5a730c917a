"""The documentation's pictures are the evaluation's sheets: which rows, in which order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from anystory_core.mini.config import PICTURE_SIZE
from lab import pictures
from lab.evaluation.report import SHOWN, slug, write_sheet
from lab.evaluation.rows import DRAWN

ROWS = [*(row for group in pictures.ABLATIONS for row in group), pictures.ONE]


class FakeTask:
    """As much of a task as a sheet shows: white references."""

    def __init__(self, subjects: int) -> None:
        white = torch.full((64, 64, 3), 255, dtype=torch.uint8).numpy()
        self.references = [(white, white[..., 0] > 0)] * subjects


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Sheets of one grey each, darker from row to row."""
    for number, row in enumerate(ROWS):
        subjects = int(row[0])
        grey = torch.full((SHOWN, 3, PICTURE_SIZE, PICTURE_SIZE), 0.6 - 0.3 * number)
        file = tmp_path / f"{slug(row)}.jpg"
        write_sheet(file, [FakeTask(subjects)] * (SHOWN - 1), grey)
        assert not file.exists()
        write_sheet(file, [FakeTask(subjects)] * SHOWN, grey)
    return tmp_path


def test_rows_are_those_of_the_evaluation() -> None:
    assert set(ROWS) <= {row.name for row in DRAWN} and len(set(ROWS)) == 6


def test_pictures_of_the_documentation(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "images"
    out.mkdir()
    monkeypatch.setattr(sys, "argv", ["pictures", "--table", str(table), "--out", str(out)])
    pictures.main()
    assert {file.name for file in out.iterdir()} == {
        "one_subject.jpg",
        "two_subjects.jpg",
        "ablations.jpg",
    }
    half = PICTURE_SIZE // 2
    parts = Image.open(out / "ablations.jpg").convert("L")
    assert parts.size == (8 * half, 2 * half // 2 + 5 * half)
    # Down the middle of a column: references, three rows, references, two rows.
    heights = [half // 2, *(half,) * 3, half // 2, *(half,) * 2]
    seen, top = [], 0
    for height in heights:
        seen.append(parts.getpixel((half // 2, top + height // 2)))
        top += height
    wanted = [255, *(127.5 * (1.6 - 0.3 * n) for n in (0, 1, 2)), 255]
    wanted += [127.5 * (1.6 - 0.3 * n) for n in (3, 4)]
    assert seen == pytest.approx(wanted, abs=4)
    assert Image.open(out / "one_subject.jpg").size == (8 * half, 2 * (half // 2 + half))


def test_a_row_that_was_not_drawn_is_named(table: Path) -> None:
    (table / "1_subject_clip_removed.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1_subject_clip_removed"):
        pictures.ablations(table)
