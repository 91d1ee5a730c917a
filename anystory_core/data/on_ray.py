"""The units of a conversion on the machines of a Ray cluster, by Ray Data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import DataError
from .convert import Converter, Unit, convert_unit
from .libraries import library
from .manifest import Report

_PASSED_ON = ("PYTHONPATH",)  # to the cluster's processes, as to processes here


def convert_on_ray(
    address: str, converter: Converter, units: Sequence[Unit], out: str, command: str
) -> Iterator[tuple[str, Report]]:
    """(shard, report) of each unit as it is done. Ray gives a unit whose process or machine died to
    another; it writes the shard over. ``out`` must be a path that all machines share, or a store.
    DataError when no cluster answers."""
    if not units:
        return
    ray = library("ray", "ray[data]")
    data = library("ray.data", "ray[data]")
    try:
        ray.init(
            address=address,
            ignore_reinit_error=True,
            log_to_driver=False,
            runtime_env={"env_vars": {n: os.environ[n] for n in _PASSED_ON if n in os.environ}},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DataError(f"--ray: no cluster answers at {address} ({error})") from error
    try:
        data.DataContext.get_current().enable_progress_bars = False
        pickle = library("ray.cloudpickle", "ray[data]")
        rows = [{"unit": pickle.dumps(unit), "shard": unit.shard} for unit in units]
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        workers = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
        done = data.from_items(rows, override_num_blocks=len(rows)).map(
            _Work,
            fn_constructor_args=(pickle.dumps(converter), out, command),
            concurrency=(1, min(workers, len(units))),
            num_gpus=gpus,
        )
        for row in done.iter_rows():
            yield str(row["shard"]), Report.of(json.loads(row["report"]))
    finally:
        ray.shutdown()


class _Work:
    """What a process of the cluster does; its converter keeps the model that it has loaded."""

    def __init__(self, converter: bytes, out: str, command: str) -> None:
        self._pickle = library("ray.cloudpickle", "ray[data]")
        self._converter: Converter = self._pickle.loads(converter)
        self._out, self._command = out, command

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        unit: Unit = self._pickle.loads(row["unit"])
        report = convert_unit(self._converter, unit, self._out, self._command)
        return {"shard": unit.shard, "report": json.dumps(report.table())}
