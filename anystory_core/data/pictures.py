"""Picture files -> arrays: pictures, soft masks, and numbered instances, or why not."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

# What Pillow raises for a damaged file, its format's reader included.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, OverflowError,
          MemoryError, Image.DecompressionBombError)  # fmt: skip
_LEAST_THIN = 4  # labels without a 3 x 3 core that are taken for a soft edge, if half of all are


def open_picture(content: bytes | Callable[[], bytes], name: str) -> Image.Image:
    """A decoded picture, turned as its camera's note says (as LoadImage turns it). DataError,
    beginning with ``name``, when it cannot be."""
    try:
        image = Image.open(io.BytesIO(content if isinstance(content, bytes) else content()))
        image.load()
        turned = ImageOps.exif_transpose(image)
        turned.format = image.format  # a copy has none
        return turned
    except DAMAGE as error:
        raise DataError(f"{name} is not a picture ({error})") from error


def to_tensor(image: Image.Image) -> Tensor:
    """(H,W,3) float in [0,1], or (H,W,4) where there is transparency. 16-bit grey keeps its
    brightness."""
    import torch

    if _is_deep(image):
        grey = np.asarray(image).astype(np.float32) / 65535
        return torch.as_tensor(grey.clip(0, 1))[..., None].expand(-1, -1, 3)
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    converted = image.convert("RGBA" if transparent else "RGB")
    return torch.as_tensor(np.array(converted)).float() / 255


def on_white(picture: Tensor) -> tuple[Tensor, Tensor | None]:
    """(H,W,3 or 4) -> ((H,W,3), alpha (H,W) or None). What colour lies under transparency is an
    accident of the program that wrote the file, mostly black."""
    if picture.shape[-1] == 3:
        return picture, None
    alpha = picture[..., 3:]
    return picture[..., :3] * alpha + (1 - alpha), alpha[..., 0]


def soft_mask(image: Image.Image, name: str) -> Tensor:
    """(H,W) float in [0,1]: brightness. DataError for a mask whose white is 1 of 255."""
    import torch

    if _is_deep(image):
        return torch.as_tensor(np.asarray(image).astype(np.float32) / 65535).clamp(0, 1)
    values = np.array(image if image.mode == "L" else image.convert("L"))
    if values.max() == 1:
        raise DataError(
            f"{name} has the values 0 and 1, of which 1 is as black as 0 in a picture of 0 to "
            "255; multiply it by 255"
        )
    return torch.as_tensor(values).float() / 255


def instance_labels(image: Image.Image, name: str) -> NDArray[np.int64]:
    """(H,W): 0 = background, i = subject i, as the file has the numbers (of a palette, those of its
    colours). DataError when they cannot be numbers: a JPEG, a soft edge, colours."""
    if image.format in ("JPEG", "MPO") or image.info.get("jfif"):
        raise DataError(
            f"{name} is a JPEG, whose compression changes the numbers of the subjects; "
            "write it as PNG"
        )
    if image.mode in ("L", "P", "1", "I") or _is_deep(image):
        labels = np.asarray(image).astype(np.int64)
    else:
        channels = np.asarray(image.convert("RGB")).astype(np.int64)
        if (channels != channels[..., :1]).any():
            raise DataError(
                f"{name} has colours ({image.mode}); write the number of each subject as one grey "
                "channel or as a palette's index"
            )
        labels = channels[..., 0]
    _refuse_soft(labels, name)
    return labels


def _refuse_soft(labels: NDArray[np.int64], name: str) -> None:
    """A soft mask's steps from 0 to 255 look like so many subjects, but are bands of a pixel."""
    numbers = np.unique(labels)
    numbers = numbers[numbers != 0]
    if len(numbers) < _LEAST_THIN:
        return
    core = np.ones(tuple(max(0, n - 2) for n in labels.shape), np.bool_)
    middle = labels[1:-1, 1:-1]
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            core &= labels[dy : dy + core.shape[0], dx : dx + core.shape[1]] == middle
    thin = len(numbers) - len(np.setdiff1d(np.unique(middle[core]), [0]))
    if thin >= _LEAST_THIN and 2 * thin >= len(numbers):
        raise DataError(
            f"{name} has {len(numbers)} different values from {numbers[0]} to {numbers[-1]}, of "
            f"which {thin} nowhere fill 3x3 pixels: a soft edge, not subjects. Write 0 for the "
            "background and i for subject i, without smoothing"
        )


def _is_deep(image: Image.Image) -> bool:
    """Whether it has 16 bits of grey."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def size_of(content: bytes, name: str) -> tuple[str, tuple[int, int], int]:
    """(format, (width, height) as stored, how it is to be turned: EXIF's 1 to 8) of a picture that
    can be decoded to its end. JPEGs are decoded at an eighth of their size, which reads every byte.
    DataError, beginning with ``name``, otherwise."""
    try:
        image = Image.open(io.BytesIO(content))
        size, kind = image.size, str(image.format)
        turn = image.getexif().get(0x0112, 1)
        if kind == "JPEG":
            image.draft(image.mode, (max(1, size[0] // 8), max(1, size[1] // 8)))
        image.load()
    except DAMAGE as error:
        raise DataError(f"{name} is not a picture ({error})") from error
    return kind, size, int(turn) if turn in range(1, 9) else 1


def png(picture: NDArray[Any]) -> bytes:
    """(H,W) uint8 or uint16, (H,W,3) or (H,W,4) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
