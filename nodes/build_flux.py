"""BuildAnyStoryFlux: the authors' weights and FLUX.1-Redux -> a file in models/anystory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..anystory_core.weights.convert.flux import convert_flux
from ..anystory_core.weights.convert.flux_pieces import MIXED_RANKS, MixedRanks
from ..anystory_core.weights.convert.pickles import SUFFIXES
from .host import ids
from .host.files import made_with_progress, output_path, source_path, state_of
from .host.saying import say

REDUX = "style_models"  # where the host's own Redux nodes look for it
RELEASES = "anystory_releases"  # the host's name for files of torch.save in models/anystory


def register() -> None:
    """Tell the host where the authors' file lies: in every models/anystory."""
    for folder in folder_paths.get_folder_paths(ids.FOLDER):
        folder_paths.add_model_folder_path(RELEASES, folder)
    paths, _ = folder_paths.folder_names_and_paths[RELEASES]
    folder_paths.folder_names_and_paths[RELEASES] = (paths, set(SUFFIXES))


register()


class BuildAnyStoryFlux(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        redux = [n for n in folder_paths.get_filename_list(REDUX) if n.endswith(".safetensors")]
        return ids.schema(
            node_id="BuildAnyStoryFlux",
            display_name="Build AnyStory for FLUX",
            category=ids.CATEGORY,
            description="Makes an AnyStory file from the authors' weights for FLUX.1-dev "
            "(anystory_flux.bin) and FLUX.1-Redux. Once; then Load AnyStory reads it.",
            search_aliases=["convert", "flux", "redux"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "anystory_flux",
                    options=folder_paths.get_filename_list(RELEASES),
                    tooltip="The authors' anystory_flux.bin (Hugging Face: Junjie96/AnyStory), in "
                    "models/anystory.",
                ),
                io.Combo.Input(
                    "redux",
                    options=redux,
                    tooltip="flux1-redux-dev.safetensors, in models/style_models.",
                ),
                io.String.Input(
                    "name",
                    default="anystory_flux",
                    tooltip="Name of the file in models/anystory. A file that this node made is "
                    "replaced, unless it was made from the same files in the same way; any other "
                    "is an error.",
                ),
                io.Combo.Input(
                    "mixed_ranks",
                    options=list(MIXED_RANKS),
                    default=MIXED_RANKS[0],
                    tooltip="Only if the node asks: what a branch is multiplied with where ranks "
                    "differ and the file names no alpha. first: first rank / own rank, as in the "
                    "authors' days. one: 1.",
                ),
            ],
            outputs=[io.String.Output(display_name="anystory_name")],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls, anystory_flux: str, redux: str, name: str, mixed_ranks: MixedRanks = "ask"
    ) -> io.NodeOutput:
        done, text = made_with_progress(
            lambda progress: convert_flux(
                *_sources(anystory_flux, redux),
                output_path(name),
                mixed_ranks=mixed_ranks,
                progress=progress,
            )
        )
        return io.NodeOutput(done.path.name, ui={"text": say([text, *done.notes])})

    @classmethod
    def fingerprint_inputs(
        cls, anystory_flux: str = "", redux: str = "", name: str = "", mixed_ranks: str = ""
    ) -> Any:
        """Changes with the settings and the two sources, and when the file made of them is gone."""
        if ids.linked(anystory_flux, redux, name):
            return None
        state = state_of(name, lambda: _sources(anystory_flux, redux))
        return anystory_flux, redux, name, mixed_ranks, state


def _sources(anystory_flux: str, redux: str) -> tuple[Path, Path]:
    """The two files. CheckpointError unless they are there."""
    return source_path(RELEASES, anystory_flux, ids.FOLDER), source_path(REDUX, redux)
