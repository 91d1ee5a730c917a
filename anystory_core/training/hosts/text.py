"""Captions -> what SDXL's U-Net reads of them, by transformers' CLIP text encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..libraries import library

TextEncoder = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


def text_encoder(encoders: Sequence[Any]) -> TextEncoder:
    """SDXL's rule for two encoders: penultimate states side by side, pooled of the second; the
    first pads with the end token, the second with 0. One encoder alone (mini): its normalised last
    states and its pooled state. States (B,77,C) and pooled (B,P) of B captions."""
    tokenizer = library("open_clip.tokenizer").SimpleTokenizer()

    def tokens(captions: Sequence[str], padding: int, device: Any) -> Tensor:
        rows = tokenizer(list(captions), context_length=77)
        ends = rows.argmax(dim=1)  # the end token has the largest number
        after = torch.arange(77)[None] > ends[:, None]
        return torch.where(after, padding, rows).to(device)

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        first = encoders[0]
        if len(encoders) == 1:
            out = first(tokens(captions, 49407, first.device))
            return out.last_hidden_state, out.pooler_output
        second = encoders[1]
        small = first(tokens(captions, 49407, first.device), output_hidden_states=True)
        large = second(tokens(captions, 0, second.device), output_hidden_states=True)
        states = torch.cat((small.hidden_states[-2], large.hidden_states[-2]), dim=-1)
        return states, large.text_embeds

    return encode
