"""Talk to a host as its editor does: HTTP, and the web socket for progress."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


class PromptError(RuntimeError):
    """The host refused or failed a prompt; the message is the host's."""


class WebSocket:
    """The little of RFC 6455 that a client on the loopback needs: text frames, pings, close."""

    def __init__(self, host: str, port: int, path: str, timeout: float) -> None:
        self.socket = socket.create_connection((host, port), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self.socket.sendall(request.encode())
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            self._fill()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise PromptError(f"the host refused the web socket: {head[:80]!r}")

    def _fill(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise PromptError("the host closed the web socket")
        self.buffer += data

    def _take(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self._fill()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def _send(self, opcode: int, payload: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(b ^ mask[i % 4] for i, b in enumerate(payload))
        self.socket.sendall(bytes((0x80 | opcode, 0x80 | len(payload))) + mask + masked)

    def receive(self) -> str | None:
        """The next text message; None for a binary one (previews)."""
        message, kind = b"", 0
        while True:
            first, second = self._take(2)
            opcode, length = first & 15, second & 127
            if length == 126:
                (length,) = struct.unpack(">H", self._take(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self._take(8))
            payload = self._take(length)
            if opcode == 9:
                self._send(10, payload)
            elif opcode == 8:
                raise PromptError("the host closed the web socket")
            elif opcode in (0, 1, 2):
                kind = opcode or kind
                message += payload
                if first & 0x80:
                    return message.decode() if kind == 1 else None

    def close(self) -> None:
        self.socket.close()


class Client:
    """One client id on one host."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        """JSON of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def fetch(self, file: dict[str, str]) -> bytes:
        """Bytes of an output file as a node's `ui` names it."""
        query = urllib.parse.urlencode(
            {k: file.get(k, "") for k in ("filename", "subfolder", "type")}
        )
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as reply:
            return reply.read()

    def upload(self, path: Path) -> str:
        """Put a picture into the host's input folder; returns its name there."""
        border = uuid.uuid4().hex
        body = (
            f'--{border}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{border}\r\nContent-Disposition: form-data; name="image"; '
            f'filename="{path.name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        ).encode() + path.read_bytes() + f"\r\n--{border}--\r\n".encode()  # fmt: skip
        request = urllib.request.Request(
            self.url + "/upload/image",
            body,
            {"Content-Type": f"multipart/form-data; boundary={border}"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["name"]

    def post(self, path: str, data: Any) -> Any:
        """JSON of a POST request; PromptError with the host's words when it refuses."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise PromptError(f"the host refused {path}: {error.read().decode()}") from error
        return json.loads(text) if text else None

    def queue(
        self,
        prompt: dict[str, Any],
        progress: Callable[[str, int, int], None] | None = None,
        timeout: float = 600,
    ) -> dict[str, Any]:
        """Run an API prompt and wait for it: the `outputs` of its history entry.

        ``progress`` gets (node type, value, maximum). PromptError carries node and message."""
        host, port = urllib.parse.urlsplit(self.url).netloc.split(":")
        web_socket = WebSocket(host, int(port), f"/ws?clientId={self.id}", timeout)
        try:
            queued = self.post("/prompt", {"prompt": prompt, "client_id": self.id})
            number = queued["prompt_id"]
            end = time.monotonic() + timeout
            while time.monotonic() < end:
                text = web_socket.receive()
                if text is None:
                    continue
                message = json.loads(text)
                data = message.get("data", {})
                if data.get("prompt_id", number) != number:
                    continue
                if message["type"] == "progress" and progress:
                    kind = prompt.get(data.get("node") or "", {}).get("class_type", "")
                    progress(kind, data["value"], data["max"])
                elif message["type"] == "execution_error":
                    raise PromptError(f"{data['node_type']}: {data['exception_message']}".strip())
                elif message["type"] == "execution_interrupted":
                    raise PromptError("interrupted")
                elif message["type"] == "executing" and data.get("node") is None:
                    return self._outputs(number)
            raise PromptError(f"no result within {timeout:.0f} s")
        finally:
            web_socket.close()

    def _outputs(self, number: str) -> dict[str, Any]:
        """The history entry appears a moment after the last message."""
        for _ in range(100):
            entry = self.get(f"/history/{number}").get(number)
            if entry:
                return entry["outputs"]
            time.sleep(0.05)
        raise PromptError("the host has no history entry of the prompt")
