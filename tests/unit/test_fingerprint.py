"""SHA-256 of files: the digest, its progress, and how it is cancelled."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from anystory_core.weights.fingerprint import file_sha256

SIZE = 9 * 2**20 + 5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(251)) * (SIZE // 251) + b"x" * (SIZE % 251))
    return path


def test_progress_adds_up(file: Path) -> None:
    seen: list[int] = []
    assert file_sha256(file, seen.append) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sum(seen) == SIZE
    assert max(seen) <= 2**23  # a bar that moves, and a cancel that is heard soon
    assert file_sha256(file) == file_sha256(file, seen.append)


def test_what_the_callback_raises_ends_the_reading(file: Path) -> None:
    seen: list[int] = []

    def cancel(size: int) -> None:
        seen.append(size)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file_sha256(file, cancel)
    assert len(seen) == 1
