"""The mini text encoder: a CLIP text transformer over CLIP's own tokens.

Only the tokens of the world's captions have rows of their own; every other token is row 0, "an
unknown word", which training sees too (words are dropped at random). So the shipped file holds a
thousand rows instead of 49,408, and :func:`anystory_core.mini.weights.full_table` rebuilds
the host's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import open_clip
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from anystory_core.mini.config import TEXT
from anystory_core.mini.weights import row_of_token

from ..world.backgrounds import PLACES
from ..world.emoji import Emoji

LENGTH = 77
START, END = 49406, 49407
TEMPLATE_WORDS = (
    "a an the of in on at by and with next to left right beside here is nothing but empty object "
    "picture photo image showing , . "
)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return open_clip.SimpleTokenizer(context_length=LENGTH)


@lru_cache(maxsize=65536)
def _tokens(text: str) -> tuple[int, ...]:
    return tuple(cast("list[int]", _tokenizer().encode(text)))


def tokenize(texts: Sequence[str]) -> Tensor:
    """(B,77) int64 tokens as the host makes them: start, text, end, padded with the end token."""
    out = torch.full((len(texts), LENGTH), END)
    for row, text in enumerate(texts):
        ids = _tokens(text)[: LENGTH - 2]
        out[row, : len(ids) + 2] = torch.tensor((START, *ids, END))
    return out


def vocabulary(emoji: Sequence[Emoji]) -> list[int]:
    """Tokens with a row of their own, ascending: those of the training names and of the captions'
    other words."""
    used = {START, END}
    for text in (*(e.name for e in emoji), *PLACES, *TEMPLATE_WORDS.split()):
        used.update(_tokens(text))
    return sorted(used)


def build_text(ids: Sequence[int]) -> Any:
    """The encoder with ``len(ids) + 1`` rows."""
    rows = row_of_token(ids)
    config = {
        **TEXT,
        "vocab_size": len(ids) + 1,
        "eos_token_id": int(rows[END]),
        "pad_token_id": int(rows[END]),
        "bos_token_id": int(rows[START]),
    }
    return cast(Any, CLIPTextModelWithProjection)(CLIPTextConfig(**config))


def encode(text_model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (B,77) -> states (B,77,D) after the final norm and pooled (B,D), as the host's
    SDClipModel gives them (last layer, pooled not projected)."""
    out = text_model.text_model(input_ids=rows)
    return out.last_hidden_state, out.pooler_output
