"""SaveAnyStorySubject and LoadAnyStorySubject: encoded subjects as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..anystory_core.errors import SubjectError
from ..anystory_core.file_names import EXTENSION, check_name
from ..anystory_core.subject import files as subject_files
from ..anystory_core.subject.subject import EncodedSubject
from ..anystory_core.weights.fingerprint import weights_fingerprint
from .bases import base_of
from .host import ids, tensors
from .host.managed import ManagedAnyStory
from .host.saying import say

FOLDER = "anystory_subjects"  # the host's name for the places below
PLACES = ("output", "models")


def folders_of(place: str) -> list[Path]:
    """Where subjects of a place lie; new ones go to the first. output: output/anystory_subjects;
    models: "subjects" in every models/anystory of the host, extra_model_paths.yaml included."""
    if place == "output":
        return [Path(folder_paths.get_output_directory()) / FOLDER]
    return [Path(folder) / ids.SUBJECTS for folder in folder_paths.get_folder_paths(ids.FOLDER)]


def register() -> None:
    """Tell the host where subjects lie; all places, so that a saved subject is listed at once."""
    for folder in (folder for place in PLACES for folder in folders_of(place)):
        folder_paths.add_model_folder_path(FOLDER, os.fspath(folder))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {EXTENSION})


register()


class SaveAnyStorySubject(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="SaveAnyStorySubject",
            display_name="Save AnyStory Subject",
            category=ids.CATEGORY,
            description="Writes an encoded subject, its options included, to a file that Load "
            "AnyStory Subject reads: no picture, CLIP vision or VAE is needed again.",
            is_output_node=True,
            inputs=[
                ids.Subject.Input("subject", tooltip="From Encode Subject or its options."),
                io.String.Input(
                    "name",
                    default="my subject",
                    tooltip="The file's name, without folder and extension.",
                ),
                io.Combo.Input(
                    "place",
                    options=list(PLACES),
                    default=PLACES[0],
                    tooltip="output: the output folder, in anystory_subjects. models: "
                    "models/anystory/subjects.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: a file of that name with another subject is an error. On: it is "
                    "replaced.",
                ),
            ],
            outputs=[ids.Subject.Output(display_name="subject")],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls, subject: EncodedSubject, name: str, place: str = PLACES[0], overwrite: bool = False
    ) -> io.NodeOutput:
        if place not in PLACES:
            raise SubjectError(f"place: got {place!r}, expected one of {list(PLACES)}")
        path = subject_files.subject_path(folders_of(place)[0], name)
        written = subject_files.save_subject(path, subject, overwrite=overwrite)
        shown = ui.PreviewImage(tensors.uint8_picture(subject.cutout), cls=cls).as_dict()
        done = "saved" if written else "was saved before"
        shown["text"] = say([f"{subject.label}: {done} as {path.name} in {place}"])
        return io.NodeOutput(subject, ui=shown)


class LoadAnyStorySubject(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="LoadAnyStorySubject",
            display_name="Load AnyStory Subject",
            category=ids.CATEGORY,
            description="Reads a subject that Save AnyStory Subject wrote. It must have been "
            "encoded by the same AnyStory weights.",
            inputs=[
                ids.AnyStory.Input("anystory", tooltip="The weights that encoded the subject."),
                io.Combo.Input(
                    "subject_name",
                    options=listed(),
                    tooltip="A file in output/anystory_subjects or models/anystory/subjects.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Not needed to use the subject. Connected, the CLIP vision weights "
                    "must be those that encoded it, so that it matches newly encoded ones.",
                ),
            ],
            outputs=[ids.Subject.Output(display_name="subject")],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls, anystory: ManagedAnyStory, subject_name: str, clip_vision: Any = None
    ) -> io.NodeOutput:
        subject = base_of(anystory).load_subject(find(subject_name), anystory)
        if clip_vision is not None:
            found = weights_fingerprint(clip_vision.model)
            subject_files.check_clip(subject, subject_name, found)
        shown = ui.PreviewImage(tensors.uint8_picture(subject.cutout), cls=cls).as_dict()
        shown["text"] = say([subject.label])
        return io.NodeOutput(subject, ui=shown)

    @classmethod
    def fingerprint_inputs(
        cls, anystory: Any = None, subject_name: str = "", clip_vision: Any = None
    ) -> Any:
        if ids.linked(subject_name):
            return None
        try:
            state = find(subject_name).stat()
            return subject_name, state.st_mtime_ns, state.st_size
        except (SubjectError, OSError):
            return subject_name  # execute says what is wrong


def listed() -> list[str]:
    """Names that :func:`find` takes; the host's list also goes into folders."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if os.sep not in name]


def find(name: str) -> Path:
    """The file of a name in the list; SubjectError unless it is there."""
    check_name(name)
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise SubjectError(
            f"subject_name: {name!r} is neither in output/{FOLDER} nor in models/"
            f"{ids.FOLDER}/{ids.SUBJECTS}; copy it there and refresh the node list"
        )
    return Path(path)
