"""Command line of the converter: public weights -> an AnyStory file.

    python -m anystory_core.convert --checkpoint sdxl.safetensors \\
        --ip-adapter ip-adapter-plus_sdxl_vit-h.safetensors --out models/anystory/public.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .bases.sdxl.config import AnyStoryConfig
from .errors import AnyStoryError
from .weights.convert.conversion import REFERENCE_NETS, convert
from .weights.convert.target import DTYPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m anystory_core.convert",
        description="Make an AnyStory file from an SDXL checkpoint and a public adapter.",
    )
    parser.add_argument("--checkpoint", help="SDXL .safetensors, or a diffusers folder")
    parser.add_argument(
        "--ip-adapter",
        required=True,
        help="ip-adapter-plus_sdxl_vit-h.safetensors, MIP-Adapter's model_sdxl_plus.bin or "
        "MS-Diffusion's ms_adapter.bin",
    )
    parser.add_argument("--out", required=True, help="models/anystory/NAME.safetensors")
    parser.add_argument(
        "--reference-net",
        choices=REFERENCE_NETS,
        default=REFERENCE_NETS[0],
        help="simplified: without cross-attention; original: with it, and the label's text; "
        "none: IP-Adapter alone, no checkpoint needed (default: %(default)s)",
    )
    parser.add_argument(
        "--no-gate", action="store_true", help="MIP-Adapter without the gate that reads the text"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="default: %(default)s")
    parser.add_argument(
        "--config", choices=("sdxl", "mini"), default="sdxl", help="sizes of the base model"
    )
    given = parser.parse_args(arguments)
    config = AnyStoryConfig.mini() if given.config == "mini" else AnyStoryConfig.sdxl()
    try:
        done = convert(
            given.checkpoint,
            given.ip_adapter,
            given.out,
            config=config,
            reference_net=given.reference_net,
            gate=not given.no_gate,
            dtype=DTYPES[given.dtype],
        )
    except AnyStoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in done.notes:
        print(f"note: {note}")
    print(
        f"{done.path}: {done.size / 1e9:.2f} GB, {done.parameters / 1e9:.3f} B parameters "
        f"({', '.join(done.parts)})" + (", kept: it was made like this before" if done.kept else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
