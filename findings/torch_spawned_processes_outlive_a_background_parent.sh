#!/usr/bin/env bash
# torch 2.14.1, Linux: processes of torch.multiprocessing.spawn are told with SIGINT that their parent
# was killed (prctl, PR_SET_PDEATHSIG), and end. A shell that is not interactive starts background jobs
# with SIGINT ignored, Python leaves an ignored SIGINT ignored, and spawned processes inherit that. So
# a run that a script began with "&" and that is killed leaves its workers behind, computing and
# writing checkpoints beside the run that takes its place.
#
# Seen: within ten seconds after the parent was killed its worker is gone when SIGINT was at its
# default, and alive when it was ignored; with signal.default_int_handler set again in the worker it is
# gone, too.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
cat > "$folder/parent.py" <<'PY'
import os
import signal
import sys
import time
from pathlib import Path

from torch.multiprocessing import spawn


def worker(number, note, handle):
    if handle:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    Path(note).write_text(str(os.getpid()))
    for _ in range(60):
        time.sleep(0.5)


if __name__ == "__main__":
    spawn(worker, (sys.argv[1], sys.argv[2] == "handled"), nprocs=1)
PY
cat > "$folder/look.py" <<'PY'
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def outlived(ignored, handled):
    note = Path(sys.argv[1]) / f"pid-{ignored}-{handled}"
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
    command = [sys.executable, sys.argv[2], str(note), "handled" if handled else "plain"]
    parent = subprocess.Popen(command)
    while not (note.exists() and note.read_text()):
        time.sleep(0.1)
    pid = int(note.read_text())
    parent.kill()
    parent.wait()
    for _ in range(100):
        alive = lives(pid)
        if not alive:
            break
        time.sleep(0.1)
    if alive:
        os.kill(pid, signal.SIGKILL)
    return alive


default, ignored, handled = outlived(False, False), outlived(True, False), outlived(True, True)
print("torch", torch.__version__)
print("outlived its parent: SIGINT at its default", default, "ignored", ignored, "handled", handled)
assert (default, ignored, handled) == (False, True, False)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" "$folder/parent.py"
