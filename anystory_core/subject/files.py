"""Encoded subjects <-> ``.safetensors`` files.

The header carries the label, the options, a thumbnail, and fingerprints of the AnyStory and CLIP
vision weights that encoded the subject; the cut-outs are stored as pictures. Reading is strict:
every tensor's name, shape and kind must fit the weights that are loaded. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ..errors import AnyStoryError, ModelMismatchError, SubjectError
from ..file_names import EXTENSION, check_name
from ..tensor_files import open_tensors, save_tensors
from .encoder import Encoders, feature_shapes
from .label import clean_label
from .subject import EncodedSubject, Subject, SubjectOptions

FORMAT = "1"
SDXL = Subject.family
MOST_VIEWS = 64
# A subject without a label has no phrase and no text, and older files neither say where a subject
# is inside nor hold its latents.
_MAY_MISS = {"phrase", "text", "pooled", "inside", "latents"}
ANY = -1  # in an expected shape
_HEADER_KEYS = ("label", "options", "weights", "clip")


def subject_path(folder: str | os.PathLike[str], name: str) -> Path:
    """``folder/name.safetensors`` for a checked name; never outside the folder."""
    path = Path(folder) / (check_name(name) + EXTENSION)
    if path.is_symlink():
        raise SubjectError(f"name: {path.name!r} is a link; choose another name")
    return path


def thumbnail(cutout: Tensor, side: int = 96) -> str:
    """A cut-out (R,R,3) uint8 as a small JPEG in a data URI, as the modelspec header has it."""
    file = io.BytesIO()
    picture = Image.fromarray(cutout.cpu().numpy())
    picture.resize((side, side), Image.Resampling.LANCZOS).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def save_subject(path: str | os.PathLike[str], subject: EncodedSubject, *, overwrite: bool) -> bool:
    """Write one subject atomically, unless the file holds it already; returns whether it was
    written. SubjectError when another one is there and ``overwrite`` is off, or of more pictures
    than :func:`load_subject` reads."""
    path = Path(path)
    if subject.views > MOST_VIEWS:
        raise SubjectError(
            f"subject: it was encoded from {subject.views} pictures, at most {MOST_VIEWS} can be "
            "saved; encode fewer of them"
        )
    tensors = subject.tensors()
    tensors["cutout"] = subject.cutout
    ready = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    header = {
        "anystory.subject": FORMAT,
        "label": subject.label,
        "options": json.dumps(_options(subject.options)),
        "weights": subject.fingerprint,
        "clip": subject.clip_fingerprint,
        "modelspec.thumbnail": thumbnail(subject.cutout[0]),
    }
    if subject.family != SDXL:  # those for SDXL were there first and do not say so
        header["family"] = subject.family
    if path.exists():
        if _holds(path, ready, header):
            return False
        if not overwrite:
            raise SubjectError(
                f"name: {path.stem!r} is already there, and another subject; choose another name, "
                "or switch overwrite on"
            )
    try:
        save_tensors(path, ready, header)
    except OSError as error:
        raise SubjectError(
            f"name: {path.name} cannot be written ({error.strerror}); free some space, or choose "
            "another folder"
        ) from error
    return True


def _holds(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:
    """Whether a file is just what would be written."""
    try:
        with open_tensors(path) as file:
            return (
                file.metadata() == header
                and set(file.keys()) == set(tensors)
                and all(torch.equal(file.get_tensor(name), x) for name, x in tensors.items())
            )
    except (SafetensorError, OSError, RuntimeError):
        return False  # whatever it is


@dataclass(frozen=True)
class SavedSubject:
    """What every saved subject holds, checked."""

    label: str
    options: SubjectOptions
    weights: str
    clip: str
    cutout: Tensor
    tensors: Mapping[str, Tensor]


class Weights(Protocol):
    """The weights that are loaded."""

    @property
    def fingerprint(self) -> str: ...


def read_subject(
    path: str | os.PathLike[str],
    model: Weights,
    expected: Callable[[int], Mapping[str, tuple[int, ...]]],
    *,
    family: str,
    size: int,
) -> SavedSubject:
    """Read one subject and check that it fits ``model``, which is of ``family`` and sees pictures
    of ``size`` squared. expected: names and shapes of the tensors of so many pictures.

    ModelMismatchError when other AnyStory weights encoded it, with both fingerprints; SubjectError
    when the file is damaged or not a subject.
    """
    path = Path(path)
    try:
        with open_tensors(path) as file:
            header = file.metadata() or {}
            options = _check_header(path.name, header)
            own = header.get("family", SDXL)
            if own != family:
                raise ModelMismatchError(
                    f"{path.name}: encoded for {own}, the loaded AnyStory weights are for "
                    f"{family}; load those that encoded it"
                )
            if header["weights"] != model.fingerprint:
                raise ModelMismatchError(
                    f"{path.name}: encoded by AnyStory weights {header['weights'] or 'unsaved'}, "
                    f"loaded are {model.fingerprint or 'unsaved'}; load those weights, or encode "
                    "the subject again"
                )
            names = set(file.keys())
            if "cutout" not in names:
                raise SubjectError(f"{path.name}: tensor cutout is missing; save the subject again")
            cutout = file.get_tensor("cutout")
            _check_cutout(path.name, cutout, size)
            shapes = dict(expected(cutout.shape[0]))
            for name in _MAY_MISS - names:
                shapes.pop(name, None)
            unknown = sorted(names - {*shapes, "cutout"})
            missing = sorted(set(shapes) - names)
            if unknown or missing:
                raise SubjectError(
                    f"{path.name}: tensors {missing[:3]} missing and {unknown[:3]} unknown; save "
                    "the subject again"
                )
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError, RuntimeError, TypeError, UnicodeError) as error:
        raise SubjectError(
            f"{path.name}: not a subject file, or a damaged one ({error}); save it again"
        ) from error
    for name, shape in shapes.items():
        _check_tensor(path.name, name, tensors[name], shape)
    return SavedSubject(
        header["label"], options, header["weights"], header["clip"], cutout, tensors
    )


def load_subject(path: str | os.PathLike[str], model: Encoders) -> Subject:
    """Read one subject for SDXL (:func:`read_subject`)."""
    size = model.config.reference.size
    saved = read_subject(path, model, lambda views: _expected(model, views), family=SDXL, size=size)
    tensors = saved.tensors
    return Subject(
        label=saved.label,
        tokens=tensors.get("tokens"),
        features=tuple(x for name, x in tensors.items() if name.startswith("features.")),
        routing=tensors.get("routing"),
        background_tokens=tensors.get("background_tokens"),
        background_routing=tensors.get("background_routing"),
        states=tensors.get("states"),
        phrase=tensors.get("phrase"),
        inside=tensors.get("inside"),
        latents=tensors.get("latents"),
        text=tensors.get("text"),
        pooled=tensors.get("pooled"),
        cutout=saved.cutout,
        fingerprint=saved.weights,
        clip_fingerprint=saved.clip,
        options=saved.options,
    )


def check_clip(subject: EncodedSubject, name: str, fingerprint: str) -> None:
    """ModelMismatchError unless ``fingerprint`` is that of the CLIP weights that encoded it."""
    if subject.clip_fingerprint != fingerprint:
        raise ModelMismatchError(
            f"{name}: encoded with CLIP vision weights {subject.clip_fingerprint or 'unknown'}, "
            f"connected are {fingerprint}; connect those, or encode the subject again"
        )


def _check_header(name: str, header: Mapping[str, str]) -> SubjectOptions:
    if "anystory.subject" not in header:
        raise SubjectError(
            f"{name}: not a saved subject; expected a file made by Save AnyStory Subject"
        )
    if header["anystory.subject"] != FORMAT:
        raise SubjectError(
            f"{name}: subject format {header['anystory.subject'][:20]!r}, this version reads "
            f"{FORMAT!r}; update the node pack or save the subject again"
        )
    missing = [key for key in _HEADER_KEYS if key not in header]
    if missing:
        raise SubjectError(f"{name}: its header lacks {missing}; save the subject again")
    label = header["label"]
    if label != clean_label(label):
        raise SubjectError(f"{name}: its label is damaged; save the subject again")
    try:
        return SubjectOptions(**json.loads(header["options"]))
    except (ValueError, TypeError, RecursionError, AnyStoryError) as error:
        raise SubjectError(f"{name}: its options are damaged; save the subject again") from error


def _check_cutout(name: str, cutout: Tensor, size: int) -> None:
    views = cutout.shape[0] if cutout.ndim else 0
    if cutout.dtype != torch.uint8 or not 1 <= views <= MOST_VIEWS:
        raise SubjectError(
            f"{name}: cutout holds {views} {cutout.dtype} pictures, expected 1 to {MOST_VIEWS} of "
            "torch.uint8; save the subject again"
        )
    if tuple(cutout.shape[1:]) != (size, size, 3):
        raise SubjectError(
            f"{name}: cutout has shape {tuple(cutout.shape)}, expected ({views}, {size}, {size}, 3)"
        )


def _options(options: SubjectOptions) -> dict[str, float | str]:
    """What a file says of them; a strength that does not change is not spoken of, so that earlier
    versions can read it."""
    said: dict[str, float | str] = asdict(options)
    if options.is_constant:
        for name in ("at_start", "at_end", "easing"):
            del said[name]
    return said


def _expected(model: Encoders, views: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a subject's tensors under these weights."""
    config, shapes = model.config, dict[str, tuple[int, ...]]()
    if model.encoder.subject is not None:
        tokens, width = config.subject_qformer.queries, config.subject_qformer.output_dim
        shapes["tokens"] = (views * tokens, width)
        if config.clip_branch.background:
            shapes["background_tokens"] = (tokens, width)
        if config.clip_branch.grounding is not None:
            shapes["states"] = (views, config.clip.tokens, config.clip.width)
            shapes["phrase"] = (config.clip_branch.grounding.phrase_dim,)
    if model.encoder.routing is not None:
        shapes["routing"] = shapes["background_routing"] = (config.routing_dim,)
    if model.reference_net is not None:
        for index, (tokens, width) in feature_shapes(config).items():
            shapes[f"features.{index}"] = (views * tokens, width)
    side = config.reference.size // config.reference.latent_stride
    shapes["inside"] = (views, side, side)
    shapes["latents"] = (views, config.unet.in_channels, side, side)
    shapes["text"] = (ANY, config.unet.context_dim)
    shapes["pooled"] = (config.unet.pooled_dim,)
    return shapes


def _check_tensor(file: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    fits = len(shape) == tensor.ndim and all(
        size in (got, ANY) for size, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits or not tensor.is_floating_point() or not tensor.numel():
        raise SubjectError(
            f"{file}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, expected floats of "
            f"shape {shape}; save the subject again"
        )
    if not bool(torch.isfinite(tensor.float()).all()):
        raise SubjectError(f"{file}: tensor {name} has NaN or infinite values; save it again")
