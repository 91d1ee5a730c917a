"""Command line of the trainer.

    python -m anystory_core.training RUN.toml            train, or go on training
    python -m anystory_core.training merge A B... OUT    join the files of stage 1 and stage 2; with
                                                         --dtype fp16 or bf16 also in half the size
    python -m anystory_core.training export FOLDER       write the weights of a run's checkpoint,
                                                         --step N, --average or --no-average

With several devices: ``accelerate launch -m anystory_core.training RUN.toml``. SIGTERM makes a run
save and end; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import AnyStoryError

_STOPPED = 143  # as shells report a process that SIGTERM has ended


def main(arguments: list[str]) -> int:
    """Run one command; errors meant for the user are one line and exit code 1."""
    commands = {"merge": _merge, "export": _export}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        if len(arguments) == 1 and not arguments[0].startswith("-"):
            return _train(Path(arguments[0]))
    except AnyStoryError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(1)  # a process group whose other members are gone may wait for them
        return 1
    asked = arguments in (["-h"], ["--help"])
    print(__doc__, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _train(path: Path) -> int:
    from .config import load_config
    from .loop import Trainer
    from .stopping import Stopped
    from .watch import together

    try:
        with together():
            file = Trainer(load_config(path)).run()
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        return _STOPPED
    print(f"wrote {file}")
    return 0


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    name = f"python -m anystory_core.training {command}"
    return argparse.ArgumentParser(prog=name, description=about)


def _merge(arguments: list[str]) -> int:
    from ..weights.convert.target import DTYPES
    from ..weights.merge import merge_files

    parser = _parser("merge", "Join the files of stage 1 and stage 2.")
    parser.add_argument("files", nargs="+", help="files that hold different parts of one model")
    parser.add_argument("out")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors; default: as they are")
    given = parser.parse_args(arguments)
    merge_files(given.files, given.out, dtype=DTYPES.get(given.dtype))
    print(f"wrote {given.out}")
    return 0


def _export(arguments: list[str]) -> int:
    from .export import export_checkpoint

    parser = _parser("export", "Write the weights file of a checkpoint of a run.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument(
        "--average",
        action=argparse.BooleanOptionalAction,
        help="the moving average; default: where there is one",
    )
    given = parser.parse_args(arguments)
    print(f"wrote {export_checkpoint(given.folder, given.step, given.average)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
