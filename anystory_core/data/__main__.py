"""From what people have to training samples, and a look at them.

    python -m anystory_core.data coco --annotations FILE --images FOLDER --out OUT
    python -m anystory_core.data COMMAND --help

Each command goes on where it was cut off, and needs only its own libraries. See docs/data.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from ..errors import AnyStoryError

COMMANDS = {
    "coco": "scenes from COCO's, LVIS's or Open Images' instance annotations",
    "deepfashion2": "pairs from DeepFashion2's annotations: a garment in the shop and worn",
    "views": "groups from renders of objects, or from 3D models that are rendered",
    "video": "groups from the shots of films",
    "parquet": "pairs from a Hugging Face data set of picture pairs, in parquet files",
    "masks": "masks for samples that have none, by a segmentation model",
    "captions": "captions by a vision-language model",
    "encode": "text states and latents ahead of training",
    "check": "look through samples: what they hold, what is wrong",
}
# encode needs the base of a run, so it is training's; this package knows only its name.
_ELSEWHERE = {"encode": "anystory_core.training.encode"}


def main(arguments: list[str]) -> int:
    """Run one command; errors meant for the user are one line and exit code 1."""
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        print(__doc__)
        print("\n".join(f"  {command:13} {what}" for command, what in COMMANDS.items()))
        return 0 if name in ("-h", "--help") else 2
    module: Any = importlib.import_module(_ELSEWHERE.get(name, f".commands.{name}"), __package__)
    parser = argparse.ArgumentParser(
        prog=f"python -m anystory_core.data {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(parser)
    try:
        code: int = module.run(parser.parse_args(arguments[1:]))
        return code
    except AnyStoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
