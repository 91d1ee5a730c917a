#!/usr/bin/env bash
# accelerate 1.15.0: Accelerator(log_with=...) leaves out trackers whose package is not installed. It
# warns only when none is left: of a list, the missing ones go without a word, and a run that was told
# to log to two places logs to one. With none left, init_trackers and log do nothing, and get_tracker
# gives a blank tracker for any name, while with another tracker there the same call is a ValueError.
#
# Seen, with tensorboard installed and aim not: ["aim", "tensorboard"] -> ['tensorboard'], no warning;
# "aim" -> [], one warning, get_tracker("aim") is a GeneralTracker. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 accelerate==1.15.0 tensorboard==2.21.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import warnings

import accelerate
from accelerate import Accelerator

print("accelerate", accelerate.__version__)


def left(given: object) -> tuple[list[str], int, str]:
    """Trackers that are left, warnings about it, and what get_tracker("aim") gives."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        accelerator = Accelerator(cpu=True, log_with=given, project_dir="logs")
    accelerator.init_trackers("run")
    accelerator.log({"loss": 1.0}, step=1)
    try:
        got = type(accelerator.get_tracker("aim")).__name__
    except ValueError as error:
        got = type(error).__name__
    names = [tracker.name for tracker in accelerator.trackers]
    return names, sum("log_with" in str(one.message) for one in said), got


for given, wanted in (
    (["aim", "tensorboard"], (["tensorboard"], 0, "ValueError")),
    ("aim", ([], 1, "GeneralTracker")),
):
    found = left(given)
    print(f"log_with={given!r}: trackers {found[0]}, warnings {found[1]}, get_tracker: {found[2]}")
    assert found == wanted, wanted
PY
