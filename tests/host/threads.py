"""Conds of an evaluation in threads, as a host spreads them over several devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def at_once(one: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The host's ``_calc_cond_batch`` with every list of conds evaluated at the same time."""

    def evaluate(model: Any, conds: list[Any], *args: Any) -> list[Any]:
        found: dict[int, Any] = {}
        start = threading.Barrier(len(conds))

        def work(place: int) -> None:
            alone = [cond if i == place else None for i, cond in enumerate(conds)]
            start.wait()
            with torch.inference_mode():
                found[place] = one(model, alone, *args)[place]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(conds))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[i] for i in range(len(conds))]

    return evaluate
