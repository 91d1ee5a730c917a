"""Look through training data: folders and shards.

Every sample is decoded and its references are cut out as a run does. The exit code is 1 when any
sample is corrupt or has files of unknown names.
"""

from __future__ import annotations

import argparse

from ..check import check
from .options import cores


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", help="folders, or WebDataset shards (*.tar)")
    parser.add_argument("--workers", type=int, default=cores(), help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    report, good = check(options.data, workers=options.workers)
    print(report)
    return 0 if good else 1
