"""Numbers of the method that do not depend on the base model, and how configurations are read.

Frozen dataclasses that check themselves when built. What a base adds is in its own folder
(:mod:`.bases.sdxl.config`).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from .errors import ConfigError

T = TypeVar("T")


LARGEST = 65_536  # far above any real size; keeps a damaged file from asking for the absurd
MOST_LAYERS = 128


def bounded(owner: object, largest: int, *names: str, least: int = 1) -> None:
    """ConfigError unless each named value (or each item of it) lies in [least, largest]."""
    for name in names:
        value = getattr(owner, name)
        items = cast("tuple[int, ...]", value if isinstance(value, tuple) else (value,))
        for item in items:
            if not least <= item <= largest:
                raise ConfigError(
                    f"{type(owner).__name__}.{name}: got {value}, expected {least} to {largest}"
                )


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """The CLIP vision encoder that the QFormers were trained on; the defaults are ViT-H/14."""

    width: int = 1280
    layers: int = 32
    heads: int = 16
    intermediate: int = 5120
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1024
    activation: str = "gelu"

    def __post_init__(self) -> None:
        sizes = ("width", "heads", "intermediate", "image_size", "patch_size", "projection_dim")
        bounded(self, LARGEST, *sizes)
        bounded(self, MOST_LAYERS, "layers")

    @property
    def tokens(self) -> int:
        """Length of the hidden state: the patches and the class token (257 for 224 / 14)."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """A Perceiver resampler of ``queries`` learned queries (paper Eq. 2, QFormer)."""

    queries: int = 64
    width: int = 1280
    layers: int = 4
    heads: int = 20
    head_dim: int = 64
    ff_mult: int = 4
    output_dim: int = 2048

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "queries", "width", "heads", "head_dim", "ff_mult", "output_dim")
        bounded(self, MOST_LAYERS, "layers")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The decoupled router (paper 3.3). ``refine=False`` stops at the coarse map (Fig. 6)."""

    key_dim: int = 256
    heads: int = 4
    refine: bool = True

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "key_dim", "heads")
        if self.key_dim % self.heads:
            raise ConfigError(
                f"RouterConfig.key_dim: got {self.key_dim}, expected a multiple of heads = "
                f"{self.heads}"
            )


@dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """Queries made of a phrase (a pooled text state of ``phrase_dim`` numbers) and a box, whose
    four numbers enter as sine and cosine of ``frequencies`` frequencies
    (:mod:`.subject.grounding`)."""

    phrase_dim: int = 768
    frequencies: int = 8

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "phrase_dim", "frequencies")

    @property
    def box_dim(self) -> int:
        """Numbers that a box becomes."""
        return 4 * 2 * self.frequencies


@dataclass(frozen=True, kw_only=True)
class ClipBranchConfig:
    """How the CLIP branch (Eq. 2 and 5) was trained, where public weights differ from the paper.

    gate: the second term of Eq. 5 is multiplied by a gate that reads the text's attention
    (:func:`.injection.equations.text_gate`). grounding: subject tokens depend on the label and the
    subject's box; None: on the picture alone. background: E_{N+1} acts outside the subjects, and in
    unconditional rows; False: nothing does. fit: how a subject's crop becomes square for CLIP, with
    padding or stretched from its box. outside: what is outside its mask, 0 after normalisation or a
    colour. strength: eta of Eq. 5 when the user's strength is 1.
    """

    gate: bool = False
    grounding: GroundingConfig | None = None
    background: bool = True
    fit: Literal["pad", "stretch"] = "pad"
    outside: Literal["zero", "black", "white"] = "zero"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 100:
            raise ConfigError(
                f"ClipBranchConfig.strength: got {self.strength}, expected above 0, at most 100"
            )


# Which references act (Eq. 6): features of the whole cut-out, as in the paper; those of the subject
# alone, without the empty space around it; those in the U-Net's decoder alone; in place of features
# what the U-Net makes of the picture at the noise of the step (:mod:`.injection.matched`); or none.
References = Literal[
    "whole", "masked", "masked in the decoder", "matched noise", "masked, matched noise", "off"
]
REFERENCES: tuple[References, ...] = typing.get_args(References)


def later(default: T) -> T:
    """A field that older files do not have: it may be missing from a complete table, and
    :func:`to_dict` leaves it out at its default."""
    return dataclasses.field(default=default, metadata={"later": True})


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain tables that :func:`from_dict` reads back."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("later") and value == field.default:
            continue
        plain = dataclasses.is_dataclass(value) and not isinstance(value, type)
        table[field.name] = to_dict(value) if plain else value
    return table


def from_dict(kind: type[T], data: object, where: str, *, complete: bool = False) -> T:
    """Build the dataclass ``kind`` from plain ``data``.

    Unknown keys are refused with the known ones; with ``complete``, so are missing ones, but for
    those of :func:`later`. ``where`` is the dotted name shown in messages.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: got {type(data).__name__}, expected a table of values")
    entries = typing.cast(dict[str, Any], data)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind)) if f.init}
    unknown = sorted(set(entries) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown {unknown}, expected among {sorted(fields)}")
    required = [
        name
        for name, f in fields.items()
        if (complete and not f.metadata.get("later"))
        or (f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
    ]
    missing = sorted(set(required) - set(entries))
    if missing:
        raise ConfigError(f"{where}: {missing} missing")
    values = {
        name: _convert(hints[name], value, f"{where}.{name}", complete)
        for name, value in entries.items()
    }
    return kind(**values)


def _convert(hint: Any, value: object, where: str, complete: bool) -> Any:
    """``value`` as the annotated type ``hint``, or a ConfigError that names ``where``."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where, complete=complete)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _convert(inner, value, where, complete)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where}: got {value!r}, expected one of {list(args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: got {value!r}, expected a list")
        items = typing.cast("list[object]", value)
        return tuple(_convert(args[0], v, f"{where}[{i}]", complete) for i, v in enumerate(items))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: got {value}, expected a finite number")
        return float(value)
    if hint is int and isinstance(value, bool) or not isinstance(value, hint):
        name = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{where}: got {value!r}, expected {name}")
    return value
