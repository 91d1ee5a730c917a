"""Write samples as WebDataset shards or plain folders, in the schema of :mod:`.schema`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Files = Mapping[str, bytes]  # suffix after the key -> content


def png(picture: NDArray[np.uint8]) -> bytes:
    """(H,W), (H,W,3) or (H,W,4) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def pair_files(
    *,
    reference: NDArray[np.uint8],
    target: NDArray[np.uint8],
    caption: str,
    reference_mask: NDArray[np.bool_] | None = None,
    target_mask: NDArray[np.bool_] | None = None,
) -> Files:
    """The files of a pair sample; ``target_mask`` is where the subject is in the target."""
    files = {
        "caption.txt": caption.encode(),
        "reference.png": png(reference),
        "target.png": png(target),
    }
    if reference_mask is not None:
        files["reference_mask.png"] = png(reference_mask.astype(np.uint8) * 255)
    if target_mask is not None:
        files["target_mask.png"] = png(target_mask.astype(np.uint8) * 255)
    return files


def scene_files(
    *, image: NDArray[np.uint8], masks: Iterable[NDArray[np.bool_]], caption: str
) -> Files:
    """The files of a scene sample; ``masks`` are the visible parts, one per subject."""
    labels = np.zeros(image.shape[:2], np.uint8)
    for number, mask in enumerate(masks, 1):
        labels[mask] = number
    return {"caption.txt": caption.encode(), "image.png": png(image), "masks.png": png(labels)}


def write_folder(samples: Iterable[tuple[str, Files]], folder: Path) -> None:
    """One file each, ``KEY.SUFFIX``."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, files in samples:
        for suffix, content in files.items():
            (folder / f"{key}.{suffix}").write_bytes(content)


def write_shards(
    samples: Iterable[tuple[str, Files]], folder: Path, *, per_shard: int = 1000
) -> None:
    """``shard-000000.tar`` and so on, with webdataset's own writer."""
    from webdataset.writer import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / "shard-%06d.tar")
    with cast(Any, ShardWriter)(pattern, maxcount=per_shard, verbose=0) as sink:
        for key, files in samples:
            sink.write({"__key__": key, **files})
