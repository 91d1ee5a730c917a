"""The documentation's pictures of the mini model: ``python -m lab.pictures --table DIR``.

Put together of the sheets that :mod:`.evaluate` wrote to its ``--out``, whose tasks are the first
ones in order: ``one_subject.jpg``, ``two_subjects.jpg``, and ``ablations.jpg`` with what each part
of the method does. All at half of the size that they were drawn in.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from anystory_core.mini.config import PICTURE_SIZE

from .evaluation.report import ACROSS, slug

IMAGES = Path(__file__).parents[1] / "docs" / "images"
ONE, TWO = "1 subject: full", "2 subjects: full"
# Rows below one another; of each but the first with its number of subjects the pictures alone.
ABLATIONS = (
    (
        "1 subject: full, routed everywhere",
        "1 subject: ReferenceNet removed",
        "1 subject: CLIP removed",
    ),
    (TWO, "2 subjects: without router"),
)
_REFERENCES = PICTURE_SIZE // 2  # height of the references above one or two subjects


def sheet(table: Path, row: str) -> Image.Image:
    """What was drawn of a row. FileNotFoundError names a sheet that is not there."""
    return Image.open(table / f"{slug(row)}.jpg")


def ablations(table: Path) -> Image.Image:
    """The first tasks of each row, as many as a sheet has side by side."""
    width, height = ACROSS * PICTURE_SIZE, _REFERENCES + PICTURE_SIZE
    parts: list[Image.Image] = []
    for first, *others in ABLATIONS:
        parts.append(sheet(table, first).crop((0, 0, width, height)))
        below = (0, _REFERENCES, width, height)
        parts += [sheet(table, row).crop(below) for row in others]
    whole = Image.new("RGB", (width, sum(part.height for part in parts)))
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="what lab.evaluate wrote to")
    parser.add_argument("--out", type=Path, default=IMAGES, help="default: docs/images")
    given = parser.parse_args()
    made = {
        "one_subject": sheet(given.table, ONE),
        "two_subjects": sheet(given.table, TWO),
        "ablations": ablations(given.table),
    }
    for name, picture in made.items():
        half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        half.save(given.out / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
