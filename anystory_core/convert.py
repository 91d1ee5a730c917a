"""Command line of the converter: public weights -> an AnyStory file.

    python -m anystory_core.convert --checkpoint sdxl.safetensors \\
        --ip-adapter ip-adapter-plus_sdxl_vit-h.safetensors --out models/anystory/public.safetensors
    python -m anystory_core.convert flux anystory_flux.bin flux1-redux-dev.safetensors \\
        models/anystory/anystory_flux.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .bases.sdxl.config import AnyStoryConfig
from .config import REFERENCES
from .errors import AnyStoryError
from .weights.convert.conversion import REFERENCE_NETS, convert
from .weights.convert.flux import convert_flux
from .weights.convert.flux_pieces import MIXED_RANKS
from .weights.convert.target import DTYPES, Converted

_PROGRAM = "python -m anystory_core.convert"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        done = _flux(given[1:]) if given[:1] == ["flux"] else _sdxl(given)
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


def _sdxl(arguments: Sequence[str]) -> Converted:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Make an AnyStory file from an SDXL checkpoint and a public adapter. For the "
        f"authors' file for FLUX: {_PROGRAM} flux --help.",
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
        "--references",
        choices=REFERENCES,
        default="off",
        help="which references act: features of the whole cut-out, of the subject alone, of the "
        "subject in the U-Net's decoder alone, what the U-Net makes of the cut-out at the noise of "
        "each step, which needs no reference net, or none (default: %(default)s)",
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
    return convert(
        given.checkpoint,
        given.ip_adapter,
        given.out,
        config=config,
        reference_net=given.reference_net,
        gate=not given.no_gate,
        references=given.references,
        dtype=DTYPES[given.dtype],
    )


def _flux(arguments: Sequence[str]) -> Converted:
    parser = argparse.ArgumentParser(
        prog=f"{_PROGRAM} flux",
        description="Make an AnyStory file from the authors' file for FLUX.1-dev and FLUX.1-Redux. "
        "The authors' file is a pickle; it is read by PyTorch's weights-only reader.",
    )
    parser.add_argument("anystory", help="anystory_flux.bin")
    parser.add_argument("redux", help="flux1-redux-dev.safetensors")
    parser.add_argument("out", help="models/anystory/NAME.safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as the sources")
    parser.add_argument(
        "--mixed-ranks",
        choices=MIXED_RANKS,
        default=MIXED_RANKS[0],
        help="where ranks differ and no alpha is given: multiply a branch with first rank / own "
        "rank, as diffusers did in the authors' days, or with one (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    dtype = None if given.dtype is None else DTYPES[given.dtype]
    return convert_flux(
        given.anystory, given.redux, given.out, dtype=dtype, mixed_ranks=given.mixed_ranks
    )


if __name__ == "__main__":
    sys.exit(main())
