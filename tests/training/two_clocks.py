"""Run under torch.distributed.run with TOML: the trainer's command, where only the first process's
clock ever says that a checkpoint is due."""

from __future__ import annotations

import math
import os
import sys

from anystory_core.training import loop as trainer
from anystory_core.training.__main__ import main

if os.environ["RANK"] != "0":
    trainer.seconds = lambda duration: math.inf
sys.exit(main(sys.argv[1:]))
