"""What a base model must say of itself, in the words that the method uses for every base."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Site:
    """Transformer block ``index`` (1-based, in forward order): where subjects enter the model.

    A base adds how its hosts and files name the block (:class:`.sdxl.sites.UNetSite`)."""

    index: int
    channels: int  # d
    heads: int
    stride: int  # latent pixels per token, along one side

    @property
    def label(self) -> str:
        """The block's name for people."""
        return f"block {self.index}"

    @property
    def short_label(self) -> str:
        """As :attr:`label`, for a small picture's caption."""
        return str(self.index)
