"""What an SDXL-like U-Net predicts, by the marks that its files carry.

Single files: a tensor ``v_pred``, and ``ztsnr`` beside it, as ComfyUI reads them; or the header's
``modelspec.prediction_type`` (Stability's ModelSpec 1.0), which ComfyUI does not read. Folders: the
scheduler's settings, as diffusers writes them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["epsilon", "v", "other"]

_EDM = ("edm_mean", "edm_vpred.sigma_max")  # tensors by which files say so
_V, _ZERO_SNR = MARKS = ("v_pred", "ztsnr")
_HEADER = "modelspec.prediction_type"
_KINDS: dict[str, Kind] = {
    "epsilon": "epsilon", "v": "v", "v_prediction": "v", "v-prediction": "v",
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """The noise ("epsilon"); the velocity ("v": alpha eps - sigma z_0, Salimans and Ho 2022); or
    what is neither, on noise levels of its own ("other"). ``zero_snr``: trained on a schedule that
    ends in noise alone (Lin et al. 2024). ``mark`` is what says so, for messages."""

    kind: Kind = "epsilon"
    zero_snr: bool = False
    mark: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.kind + (" on a schedule of zero terminal SNR" if self.zero_snr else "")


def prediction_of_file(tensors: Container[str], header: Mapping[str, str]) -> Prediction:
    """What a single file says by its tensors' names and its header: the noise, where it says
    nothing."""
    for mark in _EDM:
        if mark in tensors:
            return Prediction("other", mark=mark)
    zero_snr = _ZERO_SNR in tensors
    if _V in tensors:
        return Prediction("v", zero_snr, _V)
    return _of_text(header.get(_HEADER, "epsilon"), zero_snr)


def marks_of_file(prediction: Prediction) -> dict[str, Tensor]:
    """The tensors, empty, by which a single file says this to :func:`prediction_of_file` and to
    ComfyUI. ValueError for "other", whose noise levels they would have to hold."""
    if prediction.kind == "other":
        raise ValueError(f"prediction: got {prediction}, expected epsilon or v")
    names = [_V] * (prediction.kind == "v") + [_ZERO_SNR] * prediction.zero_snr
    return {name: torch.zeros(0) for name in names}


def prediction_of_scheduler(settings: Mapping[str, Any]) -> Prediction:
    """What a pipeline's scheduler_config.json says."""
    text = str(settings.get("prediction_type", "epsilon"))
    return _of_text(text, bool(settings.get("rescale_betas_zero_snr")))


def _of_text(text: str, zero_snr: bool) -> Prediction:
    kind = _KINDS.get(text, "other")
    # A network that predicts the noise has nothing to predict of noise alone: the host ignores the
    # mark in such a file, too.
    return Prediction(kind, zero_snr and kind == "v", text)
