#!/usr/bin/env bash
# fsspec 2026.9.0: put_file() of its HTTP file system sends POST, not PUT, unless it is told
# method="put": a plain file store (WebDAV, a bucket's signed address) answers it with an error or
# takes it for something else. open(address, "wb") cannot write at all and raises
# NotImplementedError, which is no OSError.
#
# Seen: a server on the loopback address is sent POST, and PUT when asked for it. Fails when that
# changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fsspec==2026.9.0 aiohttp==3.14.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import http.server
import threading
from pathlib import Path

import fsspec

seen: list[str] = []


class Store(http.server.BaseHTTPRequestHandler):
    def answer(self) -> None:
        seen.append(self.command)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()

    do_PUT = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
Path("part.tar").write_bytes(b"abc")
address = f"http://127.0.0.1:{server.server_port}/part.tar"
files = fsspec.filesystem("http")
files.put_file("part.tar", address)
files.put_file("part.tar", address, method="put")
print("fsspec", fsspec.__version__, "put_file():", seen[0], '; with method="put":', seen[1])
assert seen == ["POST", "PUT"]
try:
    with files.open(address, "wb") as file:
        file.write(b"abc")
except NotImplementedError as error:
    print('open(address, "wb"): NotImplementedError, an OSError:', isinstance(error, OSError))
else:
    raise AssertionError("it could be written to")
PY
