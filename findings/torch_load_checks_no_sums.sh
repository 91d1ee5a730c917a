#!/usr/bin/env bash
# torch 2.14.1: torch.load does not check the sums (CRC-32) that the zip of a file of torch.save
# holds, neither mapped nor read: a bit that flipped on a disk or on the way loads as another number,
# without a word. zipfile.testzip() finds it, so whoever converts such files asks that first.
#
# Seen: one bit of a stored tensor turned over; torch.load(mmap=False) and (mmap=True) both give 0.5
# for 1.0; testzip() names the part. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import zipfile
from pathlib import Path

import torch

torch.save({"w": torch.ones(64)}, "file.pt")
data = bytearray(Path("file.pt").read_bytes())
place = data.index(torch.ones(64).numpy().tobytes())
data[place + 2] ^= 0x80  # 1.0 is 00 00 80 3f; the exponent's lowest bit
Path("file.pt").write_bytes(data)
for mapped in (False, True):
    found = torch.load("file.pt", weights_only=True, mmap=mapped)["w"]
    print("torch", torch.__version__, "mmap", mapped, "first numbers:", found[:2].tolist())
    assert found[:2].tolist() == [0.5, 1.0]
with zipfile.ZipFile("file.pt") as archive:
    damaged = archive.testzip()
print("zipfile.testzip():", damaged)
assert damaged is not None and damaged.endswith("data/0")
PY
