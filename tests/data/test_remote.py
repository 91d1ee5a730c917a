"""Paths of other machines: a local HTTP server, and a local S3."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from public import media

from anystory_core.data import paths, shards
from anystory_core.data.check import check
from anystory_core.data.index import Index
from anystory_core.data.schema import decode


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """With ranges, as the stores have them."""

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header(
            "Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        )
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def website(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("samples")
    yield "s3://samples"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_shards_of_a_website_are_read(website: tuple[str, Path]) -> None:
    address, folder = website
    shards.write_shards(tiny.scenes(3), folder / "data", per_shard=2)
    index = Index.of([f"{address}/data/"])
    here = Index.of([str(folder / "data")])
    assert [entry.key for entry in index] == [entry.key for entry in here]
    for far, near in zip(index, here, strict=True):
        assert (decode(far).target == decode(near).target).all()
    assert check([f"{address}/data/shard-000001.tar"])[1]


def test_from_a_website_to_a_store(website: tuple[str, Path], bucket: str, data: Any) -> None:
    """Pictures by https, shards to S3, begun again, read from there."""
    address, folder = website
    shutil.copy(media() / "images" / "cheetah.jpg", folder)
    table = {
        "images": [{"id": 1, "file_name": "cheetah.jpg"}, {"id": 2, "file_name": "lost.jpg"}],
        "annotations": [
            {"image_id": i, "category_id": 1, "segmentation": [[10, 10, 90, 10, 90, 90, 10, 90]]}
            for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "instances.json").write_text(json.dumps(table))
    where = ("coco", "--annotations", f"{address}/instances.json", "--images", address)
    for _ in range(2):
        said = data(*where, "--out", f"{bucket}/cats", "--least-area", 0.001)
        assert "1 samples (1 scene) of 2 items" in said and "lost.jpg is not in" in said
    names = {paths.name_of(path) for path in paths.list_files(f"{bucket}/cats")}
    assert names == {"manifest.json", "shard-000000.tar", "shard-000000.tar.coco.json"}
    (entry,) = Index.of([f"{bucket}/cats"])
    assert entry.files["image.jpg"].read() == (folder / "cheetah.jpg").read_bytes()
    assert "index.safetensors" in {paths.name_of(p) for p in paths.list_files(f"{bucket}/cats")}
    assert [e.key for e in Index.of([f"{bucket}/cats"])] == [entry.key]
    report, good = check([f"{bucket}/cats"])
    assert good and "scene: 1" in report
    code, _, error = data.ended("check", "nowhere://data")
    assert code == 1 and "nowhere" in error
