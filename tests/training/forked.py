"""Two processes that train together, started many times: libraries are imported once, and each
start forks. Run with JOBS, a JSON file: a list of {"run": TOML, "kills": N, "seed": S}; a job with
kills is ended by SIGKILL so often at random, one of its processes at a time, before it may finish;
one with "begin", a checkpoint of a job before it, goes on from that.

Prints a JSON list: of each job, the exit codes of each start."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import kornia  # noqa: F401
import open_clip  # noqa: F401
import torch
import torch.testing
import wandb  # noqa: F401  # accelerate looks what there is
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny, UNet2DConditionModel  # noqa: F401
from torch.utils import tensorboard  # noqa: F401
from transformers import CLIPTextModel, CLIPVisionModelWithProjection  # noqa: F401

from anystory_core.training import loop, watch  # noqa: F401
from anystory_core.training.__main__ import main

RANKS = 2
PATIENCE = 600  # seconds that a process may take to end after the other


def start(path: str) -> list[int]:
    """Fork the processes of a run; their ids."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    children: list[int] = []
    for rank in range(RANKS):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        code = 70
        try:
            code = main([path])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return children


def wait(children: list[int]) -> list[int]:
    """Exit codes, or minus the signal that ended a process. TimeoutError: one has not ended."""
    codes: dict[int, int] = {}
    until = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"a process did not end after the other: {codes}")
        time.sleep(0.02)
    return [codes[child] for child in children]


def lines(path: str) -> list[str]:
    """Of the curve so far, whole ones."""
    file = Path(path).parent / "losses.jsonl"
    return [x for x in file.read_text().splitlines(True) if x[-1] == "\n"] if file.exists() else []


def ended(children: list[int]) -> bool:
    """Whether one of them has; it is left to :func:`wait`."""
    state = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return any(os.waitid(os.P_PID, child, state) for child in children)


def work(job: dict[str, object]) -> list[list[int]]:
    path, rng = str(job["run"]), random.Random(int(str(job.get("seed", 0))))
    if "begin" in job:
        begin = Path(str(job["begin"]))
        shutil.copytree(begin, Path(path).parent / "checkpoints" / begin.name)
    found: list[list[int]] = []
    for _ in range(int(str(job.get("kills", 0)))):
        children = start(path)
        # Anywhere in a step, or in the checkpoint after it: one or two more lines and a moment.
        done = lines(path)
        enough = len(done) + rng.randint(1, 2)
        until = time.monotonic() + PATIENCE
        while len(done) < enough and time.monotonic() < until and not ended(children):
            time.sleep(0.005)
            done = lines(path)
        if done:
            time.sleep(rng.random() * 1.5 * float(json.loads(done[-1])["seconds"]))
        os.kill(rng.choice(children), signal.SIGKILL)
        found.append(wait(children))
    found.append(wait(start(path)))
    return found


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([work(job) for job in jobs]))
