"""LoadAnyStory: a weights file from models/anystory."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..anystory_core.errors import CheckpointError
from .bases import base_of, load_weights, weights_header
from .host import ids
from .host.files import weights_files
from .host.managed import ManagedAnyStory
from .host.saying import say


class LoadAnyStory(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="LoadAnyStory",
            display_name="Load AnyStory",
            category=ids.CATEGORY,
            description="Loads AnyStory weights from models/anystory and says what they hold.",
            search_aliases=["anystory loader", "subject personalization"],
            inputs=[
                io.Combo.Input(
                    "anystory_name",
                    options=weights_files(),
                    tooltip="A .safetensors file in models/anystory. It carries its own sizes.",
                )
            ],
            outputs=[ids.AnyStory.Output(display_name="anystory")],
        )

    @classmethod
    @ids.named_errors
    def execute(cls, anystory_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path(ids.FOLDER, anystory_name)
        if path is None:
            raise CheckpointError(
                f"anystory_name: {anystory_name!r} is not in models/anystory; copy it there and "
                "refresh the node list"
            )
        anystory = ManagedAnyStory(load_weights(path), anystory_name)
        return io.NodeOutput(anystory, ui={"text": say([base_of(anystory).describe(anystory)])})

    @classmethod
    def fingerprint_inputs(cls, anystory_name: str) -> Any:
        if ids.linked(anystory_name):
            return None
        path = folder_paths.get_full_path(ids.FOLDER, anystory_name)
        try:
            return weights_header(path).fingerprint if path else anystory_name
        except CheckpointError:
            return anystory_name  # execute says what is wrong with the file
