#!/usr/bin/env bash
# accelerate 1.15.0: ACCELERATE_USE_CPU=true, which `accelerate launch --cpu` sets, makes Accelerator()
# join the other processes of a launch without a GPU. PartialState(), which libraries make first to
# ask for rank or device, does not read it: it finds no device to share, says that it is alone, and
# every Accelerator() made afterwards inherits that. Each process then trains by itself, without a
# word; gradients are never averaged.
#
# Seen, in two processes with RANK and WORLD_SIZE set: Accelerator() alone finds 2 processes
# (MULTI_CPU); after PartialState() it finds 1 (NO); after PartialState(cpu=True) 2. Fails when that
# changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 accelerate==1.15.0
cd "$folder"
cat > ask.py <<'PY'
import os
import sys

import accelerate
import torch

if torch.cuda.is_available():
    sys.exit("this shows what happens without a GPU")
before = sys.argv[1]
if before != "nothing":
    accelerate.PartialState(cpu=True if before == "cpu" else None)
made = accelerate.Accelerator()
made.wait_for_everyone()
if os.environ["RANK"] == "0":
    print(f"accelerate {accelerate.__version__}, before it: {before}; found:", made.num_processes)
expected = {"nothing": 2, "plain": 1, "cpu": 2}[before]
assert made.num_processes == expected, (made.num_processes, expected)
PY
for before in nothing plain cpu; do
    port=$("$folder/venv/bin/python" -c "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1])")
    processes=()
    for rank in 0 1; do
        ACCELERATE_USE_CPU=true RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 \
            MASTER_ADDR=127.0.0.1 MASTER_PORT=$port OMP_NUM_THREADS=1 \
            "$folder/venv/bin/python" ask.py "$before" &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process"; done
done
