"""Instance masks by a model on a disk: torchvision's Mask R-CNN, or what transformers can read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .libraries import SetupError, library


@dataclass(frozen=True)
class Found:
    """One instance: mask (H,W) bool, its word ("" when the model has no words), and how sure."""

    mask: NDArray[np.bool_]
    word: str
    score: float


Segmenter = Callable[[Sequence[Image.Image]], list[list[Found]]]


def load_segmenter(path: str, device: Any, *, least_score: float, trust_code: bool) -> Segmenter:
    """``path``: weights of torchvision's maskrcnn_resnet50_fpn (or _v2), or a folder as
    transformers saves one. SetupError: none of these. A folder that brings code of its own, as
    BiRefNet's does, needs ``trust_code``."""
    if Path(path).is_file():
        return _torchvision(path, device, least_score)
    config = Path(path) / "config.json"
    try:
        table: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(
            f"--model: {path} is neither a weights file nor a folder with a config.json ({error})"
        ) from error
    if "auto_map" in table:
        if not trust_code:
            raise SetupError(
                f"--model: {path} brings Python code of its own; read it, then add --trust-code"
            )
        return _foreground(path, device)
    if str(table.get("model_type", "")).startswith("sam"):
        return _everything(path, device, least_score)
    return _instances(path, device, least_score)


def _torchvision(path: str, device: Any, least_score: float) -> Segmenter:
    torch = library("torch")
    detection = library("torchvision.models.detection", "torchvision")
    functional = library("torchvision.transforms.functional", "torchvision")
    try:
        if path.endswith(".safetensors"):
            state = library("safetensors.torch", "safetensors").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        second = any(name.startswith("roi_heads.box_head.0.") for name in state)
        kind = f"maskrcnn_resnet50_fpn{'_v2' if second else ''}"
        model = getattr(detection, kind)(weights=None, weights_backbone=None)
        model.load_state_dict(state)
    except Exception as error:  # a pickle may raise anything
        detail = " ".join(str(error).split())[:200]
        raise SetupError(
            f"--model: {path} holds no weights of torchvision's Mask R-CNN ({detail})"
        ) from error
    words: list[str] = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    model.to(device).eval()

    def segment(pictures: Sequence[Image.Image]) -> list[list[Found]]:
        with torch.no_grad():
            tensors = [functional.to_tensor(picture).to(device) for picture in pictures]
            rows = model(tensors)
        return [
            [
                Found((mask[0] > 0.5).cpu().numpy(), words[int(label)], float(score))
                for mask, label, score in zip(
                    row["masks"], row["labels"], row["scores"], strict=True
                )
                if float(score) >= least_score
            ]
            for row in rows
        ]

    return segment


def _pipeline(task: str, path: str, device: Any, **more: Any) -> Any:
    transformers = library("transformers")
    try:
        return transformers.pipeline(task, model=path, device=device, **more)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        detail = " ".join(str(error).split())[:200]
        raise SetupError(f"--model: {path} cannot be used for {task} ({detail})") from error


def _instances(path: str, device: Any, least_score: float) -> Segmenter:
    """Mask2Former, MaskFormer, OneFormer, DETR: those that know instances and have words."""
    pipeline = _pipeline("image-segmentation", path, device)

    def segment(pictures: Sequence[Image.Image]) -> list[list[Found]]:
        rows = pipeline(
            list(pictures), subtask="instance", threshold=least_score, batch_size=len(pictures)
        )
        return [
            [
                Found(np.asarray(one["mask"]) > 0, str(one["label"]), float(one["score"] or 0))
                for one in row
            ]
            for row in rows
        ]

    return segment


def _everything(path: str, device: Any, least_score: float) -> Segmenter:
    """SAM and its successors, which find parts as well as wholes and have no words."""
    pipeline = _pipeline("mask-generation", path, device)

    def segment(pictures: Sequence[Image.Image]) -> list[list[Found]]:
        rows = [pipeline(picture, pred_iou_thresh=least_score) for picture in pictures]
        return [
            [
                Found(np.asarray(mask) > 0, "", float(score))
                for mask, score in zip(row["masks"], row["scores"], strict=True)
            ]
            for row in rows
        ]

    return segment


_SIDE = 1024  # BiRefNet's
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def _foreground(path: str, device: Any) -> Segmenter:
    """BiRefNet and its like: one mask of what is in front."""
    torch, transformers = library("torch"), library("transformers")
    functional = library("torchvision.transforms.functional", "torchvision")
    try:
        model = transformers.AutoModelForImageSegmentation.from_pretrained(
            path, trust_remote_code=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise SetupError(f"--model: {path} cannot be loaded ({error})") from error
    model.to(device).eval()
    dtype = next(model.parameters()).dtype

    def segment(pictures: Sequence[Image.Image]) -> list[list[Found]]:
        inputs = [
            functional.normalize(functional.to_tensor(p.resize((_SIDE, _SIDE))), _MEAN, _STD)
            for p in pictures
        ]
        with torch.no_grad():
            maps = model(torch.stack(inputs).to(device, dtype))[-1].sigmoid().float().cpu()
        found: list[list[Found]] = []
        for picture, soft in zip(pictures, maps, strict=True):
            mask = Image.fromarray(soft[0].numpy()).resize(picture.size)
            found.append([Found(np.asarray(mask) > 0.5, "", 1.0)])
        return found

    return segment
