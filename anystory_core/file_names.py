"""Names that people give to files: plain ones, the same on every system."""

from __future__ import annotations

from .errors import SubjectError

EXTENSION = ".safetensors"
_MAX_NAME = 120
# Names that Windows gives to devices, with any extension.
_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{device}{number}" for device in ("com", "lpt") for number in "0123456789¹²³"
}
_FORBIDDEN = set('<>:"/\\|?*')


def check_name(name: str) -> str:
    """A name that is a plain file name on every system, without the extension.

    SubjectError for separators, ``..``, absolute paths, device names, control characters, leading
    or trailing dots and spaces, and names that are empty or longer than 120 bytes.
    """
    stem = name[: -len(EXTENSION)] if name.lower().endswith(EXTENSION) else name
    problem = None
    if not stem.strip():
        problem = "is empty"
    elif any(c in _FORBIDDEN or not c.isprintable() for c in stem):
        problem = "has a separator or another character that file names cannot have"
    elif stem != stem.strip(" .") or ".." in stem:
        problem = "begins or ends with a dot or space, or has '..'"
    elif stem.split(".")[0].rstrip().lower() in _RESERVED:
        problem = "is reserved by Windows"
    elif len(stem.encode()) > _MAX_NAME:
        problem = f"is longer than {_MAX_NAME} bytes"
    if problem:
        raise SubjectError(
            f"name: got {name[:60]!r}, which {problem}; expected a plain name such as 'red fox'"
        )
    return stem
