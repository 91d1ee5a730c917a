"""Which block's words find a subject best: ``python -m lab.text_blocks --work WORK``.

Routing by the labels' words (:mod:`anystory_core.routing.words`) lets all blocks speak, or one.
Real held-out scenes of two and three subjects, noised to index 500, go through the shipped base
once for each choice; what counts is the overlap of the map that the last block reads with the true
masks, on that block's grid. Prints a line for each choice, with 95 % intervals.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from anystory_core.mini.weights import FOLDER
from anystory_core.mini.weights import path as weights_path
from anystory_core.routing.words import TextRoutes

from .evaluation import measures
from .evaluation.draw import SIDE, Encoder, Variant, prepare_tasks
from .evaluation.passes import clean_latents, level_record, noised_pass
from .evaluation.stack import load_anystory, stack_of_files
from .evaluation.tasks import held_out_subjects, task
from .world.emoji import download

LEVEL = 500


@torch.no_grad()
def measure(encoder: Encoder, sources: Path, numbers: range) -> dict[int, list[float]]:
    """Block, 0 for all -> the overlap of each scene."""
    sites = encoder.model.sites
    found: dict[int, list[float]] = {block: [] for block in range(len(sites) + 1)}
    subjects = held_out_subjects(sources)
    for count in (2, 3):
        for number in numbers[: len(numbers) // 2]:
            one = task(subjects, count, number)
            prepared = prepare_tasks(Variant(encoder.model, "text", agree=False), encoder, [one])
            assert isinstance(prepared.source, TextRoutes)
            clean = clean_latents(encoder, [one])
            noise = one.noise((4, SIDE, SIDE), salt=LEVEL)[None]
            text = encoder.stack.encode_text([one.caption("named")])
            for block, overlaps in found.items():
                source = replace(prepared.source, block=block, _memories={})
                call = noised_pass(
                    encoder, replace(prepared, source=source), clean, noise, LEVEL, text
                )
                record = level_record(call, 0)
                last = max(record.soft)
                maps, grid = record.soft[last][0], record.grids[last]
                overlaps.append(measures.grid_iou(maps, one.masks(), grid))
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where the sources are or go")
    parser.add_argument("--samples", type=int, default=100, help="scenes")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    download(given.work / "sources")
    encoder = Encoder(stack_of_files(FOLDER), load_anystory(weights_path("anystory")))
    found = measure(encoder, given.work / "sources", range(given.samples))
    for block, overlaps in found.items():
        figure = measures.bootstrap(overlaps)
        site = encoder.model.sites[block - 1]
        name = f"block {block} ({site.part} {site.number})" if block else "all blocks"
        print(
            f"{name:24} {100 * figure.value:.1f} ({100 * figure.low:.1f}-{100 * figure.high:.1f})"
        )


if __name__ == "__main__":
    main()
