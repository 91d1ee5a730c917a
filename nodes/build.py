"""BuildAnyStory: an SDXL checkpoint and a public adapter -> a file in models/anystory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..anystory_core.config import REFERENCES, References
from ..anystory_core.weights.convert.conversion import REFERENCE_NETS, convert
from ..anystory_core.weights.convert.pickles import SUFFIXES
from ..anystory_core.weights.convert.target import DTYPES
from .host import ids
from .host.files import made_with_progress, output_path, source_path, state_of
from .host.saying import say

ADAPTERS = "ipadapter"  # the folder that other packs use for these files too
PRECISIONS = ("fp16", "bf16")

folder_paths.add_model_folder_path(ADAPTERS, os.path.join(folder_paths.models_dir, ADAPTERS))


def _listed(folder: str) -> list[str]:
    """The folder's files that the converter opens: of checkpoints safetensors alone."""
    kinds = (".safetensors", *SUFFIXES) if folder == ADAPTERS else (".safetensors",)
    return [n for n in folder_paths.get_filename_list(folder) if n.endswith(kinds)]


class BuildAnyStory(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="BuildAnyStory",
            display_name="Build AnyStory from Public Weights",
            category=ids.CATEGORY,
            description="Makes an AnyStory file from an SDXL checkpoint and a public adapter "
            "(IP-Adapter Plus, MIP-Adapter or MS-Diffusion), without training: likeness from the "
            "adapter, detail from the U-Net itself. It holds no router: use Subject Router in the "
            "mode text or masks.",
            search_aliases=["convert", "ip-adapter", "mip-adapter", "ms-diffusion"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=_listed("checkpoints"),
                    tooltip="The SDXL checkpoint that will sample, or its base.",
                ),
                io.Combo.Input(
                    "ip_adapter",
                    options=_listed(ADAPTERS),
                    tooltip="ip-adapter-plus_sdxl_vit-h.safetensors, MIP-Adapter's "
                    "model_sdxl_plus.bin or MS-Diffusion's ms_adapter.bin, in models/ipadapter. "
                    "The node recognises which it is.",
                ),
                io.String.Input(
                    "name",
                    default="public_sdxl",
                    tooltip="Name of the file in models/anystory. A file that this node made is "
                    "replaced, unless it was made from the same files in the same way; any other "
                    "is an error.",
                ),
                io.Combo.Input(
                    "reference_net",
                    options=list(REFERENCE_NETS),
                    default=REFERENCE_NETS[0],
                    tooltip="simplified: the paper's, without cross-attention. original: with it; "
                    "Encode Subject then needs the clip. none: the adapter alone, 0.85 GB.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    tooltip="How numbers are stored. Choose bf16 for a checkpoint in bf16.",
                ),
                io.Combo.Input(
                    "references",
                    options=list(REFERENCES),
                    default="off",
                    optional=True,
                    tooltip="Which details of a subject act. whole: of its whole cut-out, as in "
                    "the paper. masked: without the empty space around the subject. masked in the "
                    "decoder: the same, in the second half of the U-Net alone. matched noise: what "
                    "the model itself makes of the cut-out, noised as the picture is at each step; "
                    "it needs no reference_net. off: none, the adapter alone is seen. Apply "
                    "AnyStory can change it.",
                ),
            ],
            outputs=[io.String.Output(display_name="anystory_name")],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls,
        checkpoint: str,
        ip_adapter: str,
        name: str,
        reference_net: str,
        precision: str,
        references: References = "off",
    ) -> io.NodeOutput:
        done, text = made_with_progress(
            lambda progress: convert(
                *_sources(checkpoint, ip_adapter),
                output_path(name),
                reference_net=reference_net,
                references=references,
                dtype=DTYPES[precision],
                progress=progress,
            )
        )
        return io.NodeOutput(done.path.name, ui={"text": say([text, *done.notes])})

    @classmethod
    def fingerprint_inputs(
        cls,
        checkpoint: str = "",
        ip_adapter: str = "",
        name: str = "",
        reference_net: str = "",
        precision: str = "",
        references: str = "",
    ) -> Any:
        """Changes with the settings and the two sources, and when the file made of them is gone."""
        if ids.linked(checkpoint, ip_adapter, name):
            return None
        state = state_of(name, lambda: _sources(checkpoint, ip_adapter))
        return checkpoint, ip_adapter, name, reference_net, precision, references, state


def _sources(checkpoint: str, ip_adapter: str) -> tuple[Path, Path]:
    """The two files. CheckpointError unless they are there."""
    return source_path("checkpoints", checkpoint), source_path(ADAPTERS, ip_adapter)
