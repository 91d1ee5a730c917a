"""Public weights -> an AnyStory file, without training.

    python -m anystory_core.convert --checkpoint sdxl.safetensors \\
        --ip-adapter ip-adapter-plus_sdxl_vit-h.safetensors --out models/anystory/public.safetensors

- subject QFormer and K^ V^ (Eq. 2, 5): those of IP-Adapter Plus, MIP-Adapter or MS-Diffusion;
- ReferenceNet (Eq. 3): the U-Net's own layers, the mask's input channel zero;
- K~ V~ (Eq. 6): the U-Net's own self-attention maps, so that a reference picture is attended to
  the way the picture attends to itself;
- no router: masks, or the labels (:mod:`~...routing.words`), decide where each subject goes.

Tensors are read, changed and written one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import torch

from ...bases.sdxl.config import AnyStoryConfig
from ...config import REFERENCES, References
from ...errors import CheckpointError
from ..model import PARTS
from .adapters import open_adapter
from .plan import plan_tensors
from .target import Converted, Meter, Progress, check_target, make_target
from .unets import open_unet

REFERENCE_NETS = ("simplified", "original", "none")  # Table 1's two, or IP-Adapter alone


def convert(
    checkpoint: str | os.PathLike[str] | None,
    ip_adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    config: AnyStoryConfig | None = None,
    reference_net: str = "simplified",
    gate: bool = True,
    references: References = "off",
    dtype: torch.dtype = torch.float16,
    progress: Progress | None = None,
) -> Converted:
    """Write an AnyStory file from an SDXL U-Net and a public adapter (:mod:`.adapters`).

    checkpoint: a single ``.safetensors`` or a diffusers folder; None only with ``reference_net``
    "none". config: sizes of the base (SDXL when None); the QFormer's own sizes are the file's.
    reference_net: "simplified" (the paper's: no cross-attention), "original" (with it; the label's
    text is then encoded with each subject), or "none". gate: MIP-Adapter's, with it or without.
    references: which references act, unless the user says otherwise when drawing; of those of
    matched noise no ``reference_net`` takes part.
    progress: what it raises ends the conversion.

    A file that was made from the same sources (by their hashes) in the same way is kept, another
    converted one is replaced. CheckpointError names what a file is instead of what was expected, or
    that ``out`` is there and no converted file; nothing is left behind then.
    """
    out = Path(out)
    if reference_net not in REFERENCE_NETS:
        raise CheckpointError(
            f"reference_net: got {reference_net!r}, expected one of {list(REFERENCE_NETS)}"
        )
    if references not in REFERENCES:
        raise CheckpointError(f"references: got {references!r}, expected one of {list(REFERENCES)}")
    base = config or AnyStoryConfig.sdxl()
    check_target(out, [Path(given) for given in (checkpoint, ip_adapter) if given is not None])
    with contextlib.ExitStack() as stack:
        adapter = open_adapter(Path(ip_adapter), base)
        stack.enter_context(adapter.source)
        unet = None
        if reference_net != "none":
            if checkpoint is None:
                raise CheckpointError(
                    f"reference_net {reference_net!r}: needs a checkpoint; give one, or choose "
                    "'none' for IP-Adapter alone"
                )
            unet = open_unet(Path(checkpoint), base)
            stack.enter_context(unet.source)
        sources = {"ip_adapter": adapter.source}
        made = {"subject_encoder", "clip_projections"}
        if unet is not None:
            sources["checkpoint"] = unet.source
            made |= {"reference_net", "reference_projections"}
        parts = tuple(part for part in PARTS if part in made)
        full = dataclasses.replace(
            adapter.config(base, gate=gate),
            references=references if unet is not None or "matched" in references else "whole",
            reference=dataclasses.replace(
                base.reference, cross_attention=reference_net == "original"
            ),
        )
        pieces = plan_tensors(full, parts, adapter, unet)
        meter = Meter.of(pieces, dtype, sources.values(), progress)
        adapter.check_face(meter.add)
        return make_target(
            out,
            pieces,
            config=full.to_json(),
            sources={kind: source.describe(meter.add) for kind, source in sources.items()},
            dtype=dtype,
            parts=parts,
            notes=adapter.notes + (unet.notes if unet else ()),
            meter=meter,
        )
