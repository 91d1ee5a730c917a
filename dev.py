#!/usr/bin/env python3
"""Start, test and measure this project: `python3 dev.py demo`, `test`, `serve`, `bench NAME`.

Needs Python 3.11 with pip and nothing else. Everything lies in `.dev/`: delete it to start afresh.
COMFYUI_PATH names a ComfyUI of your own; ANYSTORY_PYTHON an interpreter that has all it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from devkit import environment
from devkit.client import Client, PromptError
from devkit.environment import ROOT, STATE, SetupError, say
from devkit.graphs import INPUTS, draw_template, names, read_graph, run_graph
from devkit.host import running, signal_group

# Placed by masks: whoever looks knows where each subject should be.
DEMO = "two_subjects_masks"
# Of pyproject.toml, which tests and benchmarks need.
EXTRAS = ("train", "data", "lab", "ray", "test")


def demo(out: Path, graph: str, seed: int | None) -> None:
    """Queue a bundled graph and write its pictures to ``out``."""
    host = environment.prepare_host()
    interpreter = environment.prepare_python(host)
    with running(host, interpreter, STATE / "base") as process:
        start = time.monotonic()
        files, texts = run_graph(
            Client(process.url), read_graph(graph), out, seed=seed, progress=_progress_line
        )
        print()
        say(f"done in {time.monotonic() - start:.1f} s")
        for file in files:
            say(f"wrote {file}")
        for text in texts:
            say(text)


def pictures(graphs: list[str]) -> int:
    """Draw the template browser's pictures of these graphs again."""
    host = environment.prepare_host()
    interpreter = environment.prepare_python(host)
    drawn: dict[str, list[list[str]]] = {}
    with running(host, interpreter, STATE / "base") as process:
        for name in graphs:
            parts = draw_template(Client(process.url), name)
            drawn[name] = [[str(file) for file in files] for files in parts]
            say(f"drew {name}")
    command = [str(interpreter), "-m", "devkit.graphs"]
    return subprocess.run(command, cwd=ROOT, input=json.dumps(drawn), text=True).returncode


def _progress_line(node: str, value: int, maximum: int) -> None:
    print(f"\r[dev] {node}: {value}/{maximum}      ", end="", flush=True)


def test(arguments: list[str]) -> int:
    """Lint, types, then all tests; the exit code of the first that fails."""
    host = environment.prepare_host()
    interpreter = str(environment.prepare_python(host, EXTRAS))
    variables = {**os.environ, "ANYSTORY_PYTHON": interpreter, "COMFYUI_PATH": str(host)}
    # Files of tests side by side: each worker has hosts and browsers of its own. In the order of
    # collection, or a file of one long test would come last, and the other workers wait for it.
    workers = str(min(4, os.cpu_count() or 1))
    everything = ["-n", workers, "--dist", "loadfile", "--no-loadscope-reorder", "tests"]
    commands = [
        [interpreter, "-m", "ruff", "check", "."],
        [interpreter, "-m", "pyright", "--pythonpath", interpreter],
        [interpreter, "-m", "pytest", *(arguments or everything)],
    ]
    for command in commands[2:] if arguments else commands:
        say(" ".join(["python", *command[1:]]))
        code = _run(command, variables)
        if code:
            return code
    return 0


def serve(port: int | None) -> None:
    """Open the editor's server until Ctrl-C."""
    host = environment.prepare_host()
    interpreter = environment.prepare_python(host)
    base = STATE / "base"
    (base / "input").mkdir(parents=True, exist_ok=True)
    for picture in INPUTS.iterdir():
        (base / "input" / picture.name).write_bytes(picture.read_bytes())
    with running(host, interpreter, base, port=port) as process:
        say(f"open {process.url} in a browser; the graphs are under Workflow > Browse Templates")
        say("Ctrl-C ends it")
        process.process.wait()
        raise SetupError(f"the host ended by itself:\n{process.tail()}")


def bench(name: str | None, arguments: list[str]) -> int:
    """Run tests/benchmarks/bench_NAME.py."""
    folder = ROOT / "tests" / "benchmarks"
    script = folder / f"bench_{(name or '').replace('-', '_')}.py"
    if not script.exists():
        known = sorted(p.stem[6:].replace("_", "-") for p in folder.glob("bench_*.py"))
        got = "" if name is None else f"got {name!r}, "
        raise SetupError(f"bench: {got}expected one of {known}")
    host = environment.prepare_host()
    interpreter = str(environment.prepare_python(host, EXTRAS))
    variables = {**os.environ, "COMFYUI_PATH": str(host)}
    command = [interpreter, str(script), *arguments]
    return _run(command, variables)


def _run(command: list[str], variables: dict[str, str] | None = None) -> int:
    """The exit code of a command that may itself start hosts: asked to end like us, once, and
    waited for until it has ended them. ``subprocess.run`` would kill it at once."""
    # In a session of its own, or a terminal's Ctrl-C would reach it a second time while it tidies.
    child = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
    interrupted = False
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
            if os.name != "nt":  # a Windows console has told it already
                signal_group(child, signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return code


def main() -> int:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="a bundled graph, without the editor")
    command.add_argument("--out", type=Path, default=STATE / "demo", help="where pictures go")
    command.add_argument("--seed", type=int, help="another picture")
    command.add_argument("--graph", choices=names(), default=DEMO, help="default: %(default)s")
    command = commands.add_parser("serve", help="the editor, for a person")
    command.add_argument("--port", type=int, help="default: a free one")
    command = commands.add_parser("pictures", help="draw the pictures of the templates again")
    command.add_argument("graphs", nargs="*", help="names of templates; default: all")
    commands.add_parser("test", help="all tests; more arguments go to pytest")
    command = commands.add_parser(  # --help is the benchmark's
        "bench", help="a benchmark; more arguments go to it", add_help=False
    )
    command.add_argument("name", nargs="?")
    options, rest = parser.parse_known_args()
    if rest and options.command not in ("test", "bench"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.command == "demo":
        demo(options.out, options.graph, options.seed)
        return 0
    if options.command == "pictures":
        return pictures(options.graphs or names(large=True))
    if options.command == "serve":
        serve(options.port)
        return 0
    if options.command == "bench":
        return bench(options.name, rest)
    return test(rest)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # The host is stopped on the way out. Also for SIGINT: a shell's background jobs ignore it, and
    # so would the tests that they start. A closed terminal counts too, but not under nohup.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _terminate)
    try:
        sys.exit(main())
    except (SetupError, PromptError) as error:
        sys.exit(f"[dev] {error}")
    except KeyboardInterrupt:
        sys.exit(130)
