"""Run in each of two processes with TOML: the second sees nothing of what the first has written,
as on another machine. With FAIL_AT set, the second fails in that step."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from anystory_core.errors import AnyStoryError
from anystory_core.training import checkpoints
from anystory_core.training.__main__ import main
from anystory_core.training.loop import Trainer

if os.environ["RANK"] != "0":

    def unseen(*_: Any) -> None:
        raise AssertionError("only the main process reads and writes the run's folder")

    checkpoints.newest = checkpoints.write = unseen  # type: ignore[assignment]
    train = Trainer._micro_step

    def fail(trainer: Trainer, batch: Any) -> None:
        if trainer.step + 1 == int(os.environ.get("FAIL_AT", "0")):
            raise AnyStoryError("a disk of this machine is gone")
        train(trainer, batch)

    Trainer._micro_step = fail  # type: ignore[method-assign]

sys.exit(main([str(Path(sys.argv[1]))]))
