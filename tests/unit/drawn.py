"""Pictures whose subject is known: drawn at four times their size together with their mask."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIZE = 256  # of the coordinates below
_OVER = 4  # pixels are drawn for each that is kept, so outlines are smooth
SKIN, BLUE = (230, 180, 150), (40, 80, 200)


class Canvas:
    """A picture and the mask of its subject; both get what is drawn as ``body``."""

    def __init__(self, background: Any) -> None:
        side = SIZE * _OVER
        self.picture = Image.new("RGB", (side, side), background)
        self.mask = Image.new("L", (side, side), 0)

    def body(self, kind: str, *box: float, **style: Any) -> None:
        self.detail(kind, *box, **style)
        self._draw(self.mask, kind, box, {**style, "fill": 255, "outline": 255})

    def detail(self, kind: str, *box: float, **style: Any) -> None:
        self._draw(self.picture, kind, box, style)

    def _draw(self, on: Image.Image, kind: str, box: Any, style: dict[str, Any]) -> None:
        scaled = {k: v * _OVER if k in ("width", "radius") else v for k, v in style.items()}
        getattr(ImageDraw.Draw(on), kind)([v * _OVER for v in box], **scaled)

    def read(self, side: int = SIZE, jpeg: int | None = None) -> tuple[Tensor, Tensor]:
        """Picture (side,side,3) in [0,1] and mask (side,side) bool."""
        picture, mask = (x.resize((side, side), Image.Resampling.BOX) for x in self.both())
        if jpeg:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=jpeg)
            picture = Image.open(file)
        rgb = np.array(picture, dtype=np.float32) / 255
        return torch.from_numpy(rgb), torch.from_numpy(np.array(mask) > 127)

    def both(self) -> tuple[Image.Image, Image.Image]:
        return self.picture, self.mask


def snowman(canvas: Canvas, line: Any = "black") -> None:
    """As white as a white background; only the outline tells them apart."""
    for box in ((88, 30, 168, 110), (73, 90, 183, 200)):
        canvas.body("ellipse", *box, fill="white", outline=line, width=2)
    for x in (112, 138):
        canvas.detail("ellipse", x, 58, x + 8, 66, fill="black")


def pale_snowman(canvas: Canvas) -> None:
    snowman(canvas, (150, 150, 160))


def bust(canvas: Canvas, left: float = 53, shirt: Any = "white") -> None:
    """Cut off by the lower edge, with white eyes and a white shirt."""
    canvas.body(
        "rounded_rectangle", left, 150, SIZE - left, 330, radius=40, fill=shirt,
        outline="black", width=3,
    )  # fmt: skip
    canvas.body("ellipse", 88, 50, 168, 160, fill=SKIN, outline="black", width=3)
    for x in (105, 140):
        canvas.detail("ellipse", x, 90, x + 14, 100, fill="white", outline="black", width=1)


def broad_bust(canvas: Canvas) -> None:
    bust(canvas, 12)


def red_bust(canvas: Canvas) -> None:
    bust(canvas, shirt=(200, 30, 30))


def spread(canvas: Canvas, sleeve: Any = BLUE) -> None:
    """Touches the left and the right edge; the shirt is white."""
    canvas.body("rectangle", -20, 100, 280, 180, fill=sleeve, outline="black", width=2)
    canvas.body("rectangle", 98, 95, 158, 230, fill="white", outline="black", width=2)
    canvas.body("ellipse", 100, 30, 156, 110, fill=SKIN, outline="black", width=2)
    for x in (112, 132):
        canvas.detail("ellipse", x, 66, x + 12, 76, fill="white", outline="black", width=1)


def white_sleeves(canvas: Canvas) -> None:
    spread(canvas, "white")


def corner(canvas: Canvas) -> None:
    """Fills the lower left corner: only two sides are plain."""
    canvas.body("rectangle", -20, 90, 190, 290, fill=BLUE)
    canvas.body("ellipse", 60, 20, 140, 110, fill=SKIN)


def standing(canvas: Canvas) -> None:
    """Stands on the lower edge; the gap between the legs is background."""
    canvas.body("rectangle", 98, 80, 158, 170, fill="darkgreen")
    for x in (98, 138):
        canvas.body("rectangle", x, 170, x + 20, 260, fill="navy")
    canvas.body("ellipse", 104, 20, 152, 84, fill=SKIN)


SUBJECTS: tuple[Callable[[Canvas], None], ...] = (
    snowman, pale_snowman, bust, broad_bust, red_bust, spread, white_sleeves, corner, standing,
)  # fmt: skip


def drawn(
    subject: Callable[[Canvas], None], background: Any = "white", **reading: Any
) -> tuple[Tensor, Tensor]:
    """Picture (H,W,3) in [0,1] and mask (H,W) bool of a subject on a background."""
    canvas = Canvas(background)
    subject(canvas)
    return canvas.read(**reading)


def busy(side: int = SIZE) -> Tensor:
    """A picture (H,W,3) without a plain border."""
    return torch.rand(side, side, 3, generator=torch.Generator().manual_seed(0))


def overlap(found: Tensor, subject: Tensor) -> float:
    """Intersection over union of a mask in [0,1] with a mask bool."""
    inside = found > 0.5
    return float((inside & subject).sum() / (inside | subject).sum())
