"""BuildAnyStory: an SDXL checkpoint and a public adapter -> a file in models/anystory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..anystory_core.config import REFERENCES, References
from ..anystory_core.errors import AnyStoryError, CheckpointError
from ..anystory_core.file_names import EXTENSION, check_name
from ..anystory_core.weights.convert.conversion import REFERENCE_NETS, convert
from ..anystory_core.weights.convert.pickles import SUFFIXES
from ..anystory_core.weights.convert.target import DTYPES
from .host import ids
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
                    default="masked",
                    optional=True,
                    tooltip="Which details of a subject act. whole: of its whole cut-out, as in "
                    "the paper. masked: without the empty space around the subject. masked in the "
                    "decoder: the same, in the second half of the U-Net alone. Apply AnyStory can "
                    "change it.",
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
        references: References = "masked",
    ) -> io.NodeOutput:
        file = check_name(name) + EXTENSION
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int) -> None:
            mm.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        done = convert(
            *_sources(checkpoint, ip_adapter),
            _output(file),
            reference_net=reference_net,
            references=references,
            dtype=DTYPES[precision],
            progress=progress,
        )
        bar.update_absolute(1, 1)
        text = f"{file}: {done.size / 1e9:.2f} GB, {', '.join(done.parts)}"
        if done.kept:
            text += "; kept, it was made from the same files in the same way"
        return io.NodeOutput(file, ui={"text": say([text, *done.notes])})

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
        try:
            made = _output(check_name(name) + EXTENSION).is_file()
            sources = [path.stat() for path in _sources(checkpoint, ip_adapter)]
        except (AnyStoryError, OSError):
            made, sources = False, []  # execute says what is wrong
        states = [(state.st_size, state.st_mtime_ns) for state in sources]
        return checkpoint, ip_adapter, name, reference_net, precision, references, states, made


def _sources(checkpoint: str, ip_adapter: str) -> tuple[Path, Path]:
    """The two files. CheckpointError unless they are there."""
    return _path("checkpoints", checkpoint), _path(ADAPTERS, ip_adapter)


def _output(file: str) -> Path:
    """Where a file of this name is written: the first models/anystory."""
    return Path(folder_paths.get_folder_paths(ids.FOLDER)[0]) / file


def _path(folder: str, name: str) -> Path:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise CheckpointError(
            f"{name!r} is not in models/{folder}; copy it there and refresh the node list"
        )
    return Path(path)
