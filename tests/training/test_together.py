"""Several processes: none is left waiting, and machines need not share a folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer
from anystory_core.training.ranks import Ranks
from anystory_core.training.watch import Watch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PATIENCE = 1800  # seconds; forty suffice on an idle machine


class MemoryStore:
    """A store that threads share."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False

    def set(self, key: str, value: str) -> None:
        self._alive()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._alive()
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        self._alive()
        return all(key in self.values for key in keys)

    def _alive(self) -> None:
        if self.gone:
            raise RuntimeError("connection closed")


class Ends:
    """Notes why a process would have ended."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.came = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.came.set()


def watches(store: MemoryStore, **settings: Any) -> tuple[list[Watch], list[Ends]]:
    ends = [Ends(), Ends()]
    made = [Watch(store, i, 2, end=ends[i], beat=0.01, **settings) for i in range(2)]
    return made, ends


def test_a_failure_reaches_the_others() -> None:
    (main, other), (_, end) = watches(MemoryStore())
    assert main.close("the disk is full") is None
    assert end.came.wait(10) and end.reasons == ["process 0 has failed: the disk is full"]
    assert other.close("the connection broke off") == "process 0 has failed: the disk is full"


def test_a_process_that_dies_without_a_word() -> None:
    """Ended by the system, it says nothing; its silence is noticed."""
    store = MemoryStore()
    end = Ends()
    main = Watch(store, 0, 2, end=end, beat=0.01, silence=0.3)
    store.set("alive/1", "1")
    assert end.came.wait(10) and "process 1 has shown no life" in end.reasons[0]
    main.close("told")


def test_the_main_process_dies() -> None:
    store = MemoryStore()
    (main, _), (_, end) = watches(store)
    store.gone = True
    assert end.came.wait(10) and end.reasons == ["the main process has ended"]
    main.close()


def test_a_good_end_is_no_failure() -> None:
    (main, other), ends = watches(MemoryStore(), silence=0.2)
    other.close()
    time.sleep(0.5)  # over is not silent
    main.close()
    assert not ends[0].reasons and not ends[1].reasons


def test_one_alone_is_its_own_main_process() -> None:
    ranks = Ranks(torch.device("cpu"))
    assert ranks.main and ranks.broadcast(3) == 3 and ranks.gather("a") == ["a"]
    assert ranks.any(True, False) == (True, False)
    assert ranks.mean({"x": torch.tensor(2.0)}) == {"x": 2.0}
    ranks.same("anything", 1, "")
    with pytest.raises(ZeroDivisionError):
        ranks.on_main(lambda: 1 // 0)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(path: Path, **variables: str) -> list[subprocess.Popen[str]]:
    """Two processes as a batch system starts them: nobody ends one when the other fails."""
    port = str(free_port())
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
            **variables,
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(HERE / "two_machines.py"), str(path)], env=environment,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return processes


def test_two_machines_without_a_shared_folder(world: Any, tmp_path: Path) -> None:
    """One fails in step 2: both end, the other with its sentence. Started again, both go on from
    the step and the weights that the first has, and to the same losses as one alone."""
    path = tiny.run_toml(
        tmp_path / "two", world.base, world.pairs, "subject", steps=3,
        run={"batch": 2, "log_every": 1, "checkpoint_every": "0.001 s"}, optimiser={"ema": 0.9},
    )  # fmt: skip
    failed = start(path, FAIL_AT="2")
    said = [process.communicate(timeout=PATIENCE)[1] for process in failed]
    assert [process.returncode for process in failed] == [1, 1], said
    assert "error: process 1 has failed: a disk of this machine is gone" in said[0]
    again = start(path)
    said = [process.communicate(timeout=PATIENCE)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert "resuming from step 1" in said[0] and "resuming" not in said[1]
    text = (tmp_path / "two" / "losses.jsonl").read_text()
    two = {line["step"]: line["loss"] for line in map(json.loads, text.splitlines())}
    alone = tiny.run_toml(
        tmp_path / "one", world.base, world.pairs, "subject", steps=3,
        run={"batch": 4, "log_every": 1},
    )  # fmt: skip
    Trainer(load_config(alone)).run()
    text = (tmp_path / "one" / "losses.jsonl").read_text()
    one = {line["step"]: line["loss"] for line in map(json.loads, text.splitlines())}
    assert two.keys() == one.keys() == {1, 2, 3}
    # The mean of two halves against the mean of the whole: float32 rounding.
    assert [two[s] for s in one] == pytest.approx([one[s] for s in one], rel=1e-4)
