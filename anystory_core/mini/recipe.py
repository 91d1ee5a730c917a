"""Make the mini model, phase by phase: ``python -m anystory_core.mini.recipe --work DIR``.

Every phase resumes where it stopped, has its own seed, and writes its curve to ``DIR/NAME.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import emoji
from .vae import train_vae


def main() -> None:
    """Run one phase, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for sources and states")
    parser.add_argument("--phase", choices=("world", "vae"), help="only this phase")
    options = parser.parse_args()
    work: Path = options.work
    sources = work / "sources"
    emoji.download(sources)
    training, _ = emoji.split(emoji.load_emoji(sources))
    if options.phase in (None, "vae"):
        train_vae(training, work)


if __name__ == "__main__":
    main()
