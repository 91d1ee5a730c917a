"""Local paths, and those of fsspec: ``s3://``, ``gs://``, ``https://`` and its other protocols.

A path is remote when it has ``://``. What is local goes through the operating system, so that
fsspec is needed by nobody else.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

from ..errors import DataError


def is_remote(path: str) -> bool:
    """Whether fsspec is needed to reach a path."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """``folder/name``."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def name_of(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2] if is_remote(path) else Path(path).name


@contextmanager
def _store() -> Generator[None, None, None]:
    """Each store has exceptions of its own, none of them the operating system's."""
    try:
        yield
    except (OSError, DataError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of a remote path, and the path as that file system calls it."""
    try:
        found: Any = importlib.import_module("fsspec.core").url_to_fs(path)
    except ImportError as error:
        raise DataError(
            f"{path}: {error}. Install what its protocol needs, such as "
            "pip install s3fs (s3://), gcsfs (gs://), aiohttp (https://)"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return found


def explain(path: str, error: Exception) -> DataError:
    """An error of the operating system or of a remote store, with the path."""
    return DataError(f"{path} cannot be read ({type(error).__name__}: {error})")


def read(path: str, offset: int = 0, size: int = -1) -> bytes:
    """``size`` bytes from ``offset`` on; -1 reads to the end. OSError as the store gives it."""
    if is_remote(path):
        end = None if size < 0 else offset + size
        with _store():
            system, inside = filesystem(path)
            return bytes(system.cat_file(inside, start=offset or None, end=end))
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def open_file(path: str) -> IO[bytes]:
    """A seekable file to read."""
    if is_remote(path):
        with _store():
            system, inside = filesystem(path)
            return cast("IO[bytes]", system.open(inside, "rb"))
    return open(path, "rb")


def is_folder(path: str) -> bool:
    """Whether a folder lies there. A store without folders has one where names begin so."""
    if is_remote(path):
        with _store():
            system, inside = filesystem(path)
            return bool(system.isdir(inside))
    return os.path.isdir(path)


def exists(path: str) -> bool:
    """Whether a file or folder lies there."""
    if is_remote(path):
        with _store():
            system, inside = filesystem(path)
            return bool(system.exists(inside))
    return os.path.exists(path)


def stamp(path: str) -> tuple[int, str]:
    """(bytes, a word that changes when the file does)."""
    if is_remote(path):
        with _store():
            system, inside = filesystem(path)
            info: dict[str, Any] = system.info(inside)
        changed = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
        return int(info.get("size") or 0), str(changed)
    status = os.stat(path)
    return status.st_size, str(status.st_mtime_ns)


def list_files(folder: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Paths of the files right in a folder, sorted; ``suffixes`` in lower case choose."""
    if is_remote(folder):
        names = _remote_names(folder, "file")
    else:
        names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    return [join(folder, name) for name in sorted(names) if name.lower().endswith(suffixes or "")]


def list_folders(folder: str) -> list[str]:
    """Paths of the folders right in a folder, sorted."""
    if is_remote(folder):
        names = _remote_names(folder, "directory")
    else:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return [join(folder, name) for name in sorted(names)]


def _remote_names(folder: str, kind: str) -> list[str]:
    with _store():
        system, inside = filesystem(folder)
        entries: list[dict[str, Any]] = system.ls(inside, detail=True)
        return [name_of(str(entry["name"])) for entry in entries if entry["type"] == kind]


def make_folder(path: str) -> None:
    """With its parents, where there are such things. DataError when it cannot be."""
    try:
        if is_remote(path):
            with _store():
                system, inside = filesystem(path)
                system.makedirs(inside, exist_ok=True)
        else:
            Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be made ({error})") from error


@contextmanager
def writing(path: str) -> Generator[Path, None, None]:
    """A local path to write to; when the block ends well the file is at ``path``, whole, and after
    an error nothing is. DataError when the disk or the store refuses."""
    if is_remote(path):
        with TemporaryDirectory() as folder:
            local = Path(folder) / name_of(path)
            yield local
            system, inside = filesystem(path)
            _keep(path, lambda: system.put_file(str(local), inside))
        return
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        yield temporary
        _keep(path, lambda: os.replace(temporary, path))
    finally:
        temporary.unlink(missing_ok=True)


def _keep(path: str, action: Callable[[], object]) -> None:
    try:
        with _store():
            action()
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error})") from error


def write(path: str, content: bytes) -> None:
    """The whole file or nothing."""
    with writing(path) as file:
        try:
            file.write_bytes(content)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error})") from error


@contextmanager
def local_copy(path: str) -> Generator[str, None, None]:
    """The path itself; of a remote one, a copy that lives as long as the block."""
    if not is_remote(path):
        yield path
        return
    with TemporaryDirectory() as folder:
        local = os.path.join(folder, name_of(path))
        try:
            with open_file(path) as source, open(local, "wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise explain(path, error) from error
        yield local
