#!/usr/bin/env bash
# wandb 0.31.0, Linux, WANDB_MODE=offline: when Run.finish() has returned, the run's log
# (wandb/offline-run-*/run-*.wandb) may still hold its header of 7 bytes alone. A service beside the
# process writes it, and the rest comes some milliseconds later. Whoever copies, syncs or reads the
# folder at once gets an empty run; wandb.teardown(), which waits for the service to end, makes it
# whole.
#
# Seen: of short runs one after another, one in two to one in fifteen had 7 bytes when finish()
# returned and about 1,900 later, the more the busier the machine; after teardown() none lacks anything.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q wandb==0.31.0
cat > "$folder/look.py" <<'PY'
import sys
from pathlib import Path

import wandb


def log_of(number):
    (log,) = Path(sys.argv[1]).glob(f"wandb/offline-run-*-number{number}/*.wandb")
    return log


early = []
for number in range(150):
    run = wandb.init(project="finish", id=f"number{number}", dir=sys.argv[1])
    run.log({"loss": 1.0})
    run.finish()
    early.append(log_of(number).stat().st_size)
    if number >= 20 and min(early) == 7:
        break
wandb.teardown()
late = [log_of(number).stat().st_size for number in range(len(early))]
behind = sum(before < after for before, after in zip(early, late))
print("wandb", wandb.__version__)
print(f"behind when finish() returned: {behind} of {len(early)}; smallest {min(early)}, later {min(late)}")
assert behind > 0 and min(early) == 7 and min(late) > 1000
PY
cd "$folder"
WANDB_MODE=offline WANDB_SILENT=true "$folder/venv/bin/python" "$folder/look.py" "$folder"
