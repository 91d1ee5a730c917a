"""Optimisers by name, what they take of memory, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import ConfigError
from .libraries import library
from .ranks import Ranks
from .settings import OptimiserSettings
from .sharding import fill, put

_BLOCK = 256  # values that share a scale in 8-bit moments
_LEAST_8_BIT = 4096  # tensors with fewer values keep moments of their own number type
# Of a parameter group, what the run's file says of it.
_CHOSEN = ("lr", "betas", "eps", "weight_decay")


def build_optimisers(
    parameters: Sequence[nn.Parameter], settings: OptimiserSettings
) -> list[torch.optim.Optimizer]:
    """The optimisers that update these parameters together: one, but for Muon, which is for
    matrices and leaves the rest to AdamW. ConfigError: its package is not installed."""
    lr, decay = settings.learning_rate, settings.weight_decay
    adam: dict[str, Any] = {
        "lr": lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": decay,
    }
    half = settings.weights == "bf16"
    if settings.name == "adamw_8bit":
        kind = _package("torchao.optim", settings).AdamW8bit
        return [kind(parameters, **adam, block_size=_BLOCK, bf16_stochastic_round=half)]
    if settings.name == "adafactor":
        # Its rate is the file's, not one of its own that follows the parameters' size.
        kind = library("transformers").Adafactor
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return [kind(parameters, lr=lr, weight_decay=decay, **fixed)]
    if settings.name == "prodigy":
        kind = _package("prodigyopt", settings).Prodigy
        warm = settings.warmup_steps > 0
        return [kind(parameters, **adam, use_bias_correction=True, safeguard_warmup=warm)]
    if settings.name == "muon":
        matrices = [p for p in parameters if _is_matrix(p)]
        others = [p for p in parameters if not _is_matrix(p)]
        # With AdamW's size of a step, one rate serves both (Liu et al., arXiv 2502.16982).
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(others, **adam, fused=True)]
    if half:
        kind = _package("torchao.optim", settings)._AdamW
        return [kind(parameters, **adam, bf16_stochastic_round=True)]
    # Fused: one pass over all parameters; on a CPU the default is a loop over them.
    return [torch.optim.AdamW(parameters, **adam, fused=True)]


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim == 2


def _package(module: str, settings: OptimiserSettings) -> Any:
    try:
        return library(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise ConfigError(
            f"optimiser.name: {settings.name!r} with weights in {settings.weights} needs {name} "
            f"({error}); pip install {name}, or choose another optimiser"
        ) from error


def state_bytes(parameters: Iterable[Tensor], settings: OptimiserSettings) -> int:
    """What the optimiser keeps of these parameters, in bytes, scalars left out."""
    return sum(_state_bytes(p, settings) for p in parameters)


def _state_bytes(p: Tensor, settings: OptimiserSettings) -> int:
    count, size = p.numel(), p.element_size()
    if settings.name == "adamw_8bit" and count >= _LEAST_8_BIT and count % _BLOCK == 0:
        return 2 * (count + 4 * count // _BLOCK)
    if settings.name == "adafactor" and p.ndim >= 2:
        last, before = p.shape[-1], p.shape[-2]
        return 4 * (count // last + count // before)
    if settings.name == "adafactor":
        return 4 * count
    if settings.name == "prodigy":
        return 4 * size * count
    if settings.name == "muon" and _is_matrix(p):
        return size * count
    return 2 * size * count


def set_rate(optimisers: Iterable[Any], rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in _groups(optimisers):
        _set(group, rate)


def _set(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao's, which compiled code reads
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _groups(optimisers: Iterable[Any]) -> list[dict[str, Any]]:
    return [group for optimiser in optimisers for group in optimiser.param_groups]


class State(TypedDict):
    """What a checkpoint keeps of optimisers: by parameter name the values of each key, and of each
    parameter group what it has learned."""

    states: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]


def read_state(
    optimisers: Sequence[Any], named: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]
) -> State:
    """The state of all parameters. ``gather`` makes a tensor whole that processes hold parts of;
    they call this together."""
    states = {name: _flat(_state_of(optimisers, p)) for name, p in named.items()}
    for own in states.values():
        for key, value in own.items():
            if isinstance(value, Tensor):
                own[key] = gather(value)
    groups = [
        {key: value for key, value in group.items() if key not in ("params", *_CHOSEN)}
        for group in _groups(optimisers)
    ]
    return {"states": states, "groups": groups}


def load_state(
    optimisers: Sequence[Any], named: Mapping[str, Tensor], kept: State | None, ranks: Ranks
) -> None:
    """Put a state back, of which the main process has all and the others nothing. What the run's
    file says of a group stays. KeyError or ValueError: it is of other optimisers."""
    for optimiser in optimisers:
        _begin(getattr(optimiser, "optimizer", optimiser))
    kept = kept or {"states": {}, "groups": []}
    plain = {
        name: {key: None if isinstance(x, Tensor) else x for key, x in own.items()}
        for name, own in kept["states"].items()
    }
    plain, groups = ranks.broadcast((plain, kept["groups"]))
    for name, parameter in named.items():
        state, given = _state_of(optimisers, parameter), kept["states"].get(name, {})
        own = _flat(state)
        if own.keys() != plain[name].keys():
            raise ValueError(f"{name} has {sorted(plain[name])}, expected {sorted(own)}")
        for key, value in plain[name].items():
            if value is not None:
                state[key] = value
            elif key in state:
                state[key] = put(own[key], given.get(key), ranks)
            else:
                fill(own[key], given.get(key), ranks)
    for group, values in zip(_groups(optimisers), groups, strict=True):
        group.update(values)


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state with 8-bit moments as the tensors that they consist of, which cannot be
    told from their values: rounding these again gives others. Moments of which each process holds a
    part stay what they are."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        shared = isinstance(value, DTensor)
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value) and not shared:
            names, _ = value.__tensor_flatten__()
            flat |= {f"{key}.{name}": getattr(value, name) for name in names}
        else:
            flat[key] = value
    return flat


def _begin(optimiser: torch.optim.Optimizer) -> None:
    """Let an optimiser make its states, by a step without gradients of no size."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    rates = [float(group["lr"]) for group in optimiser.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    set_rate([optimiser], 0.0)
    optimiser.step()
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        _set(group, rate)
    optimiser.zero_grad(set_to_none=True)


def _state_of(optimisers: Sequence[Any], parameter: Tensor) -> dict[str, Any]:
    for optimiser in optimisers:
        state = cast("dict[Tensor, dict[str, Any]]", optimiser.state)
        if parameter in state:
            return state[parameter]
    return {}
