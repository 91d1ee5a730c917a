"""Command line of the trainer.

    python -m anystory_core.training RUN.toml            train, or go on training
    python -m anystory_core.training merge A B... OUT    join the files of stage 1 and stage 2; with
                                                         --dtype fp16 or bf16 also in half the size

With several devices: ``accelerate launch -m anystory_core.training RUN.toml``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import AnyStoryError


def main(arguments: list[str]) -> int:
    """Run one command; errors meant for the user are one line and exit code 1."""
    try:
        if len(arguments) >= 3 and arguments[0] == "merge":
            return _merge(arguments[1:])
        if len(arguments) == 1 and arguments[0] not in ("merge", "-h", "--help"):
            from .config import load_config
            from .loop import Trainer

            path = Trainer(load_config(Path(arguments[0]))).run()
            print(f"wrote {path}")
            return 0
    except AnyStoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(__doc__)
    return 2


def _merge(arguments: list[str]) -> int:
    from ..weights.convert.target import DTYPES
    from ..weights.merge import merge_files

    parser = argparse.ArgumentParser(prog="python -m anystory_core.training merge")
    parser.add_argument("files", nargs="+", help="files that hold different parts of one model")
    parser.add_argument("out")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors; default: as they are")
    given = parser.parse_args(arguments)
    merge_files(given.files, given.out, dtype=DTYPES.get(given.dtype))
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
