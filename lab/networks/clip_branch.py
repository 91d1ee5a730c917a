"""AnyStory's CLIP branch as the base learns with it: subject tokens (Eq. 2), K^ and V^ (Eq. 5).

A base that has only seen references leaves the tokens of stage 1 little to say: nothing in it goes
by them. So the base is shown them beside the references, and its branch is what stage 1 begins
with (:mod:`..files.start`).
"""

from __future__ import annotations

from torch import Tensor, nn

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.injection.keys import Candidates
from anystory_core.injection.prepare import project
from anystory_core.weights.model import PARTS, AnyStoryModel, build_model

CLIP_PARTS = ("subject_encoder", "clip_projections")


class ClipBranch(nn.Module):
    """Its tensors have the names that they have in AnyStory's file."""

    def __init__(self, config: AnyStoryConfig) -> None:
        super().__init__()
        model = build_model(config, CLIP_PARTS)
        self.encoder, self.projections, self.sites = model.encoder, model.projections, model.sites

    def copy_from(self, model: AnyStoryModel) -> None:
        """Take a model's branch. RuntimeError when it has none."""
        prefixes = tuple(PARTS[part] for part in CLIP_PARTS)
        state = model.state_dict()
        self.load_state_dict({n: t for n, t in state.items() if n.startswith(prefixes)})

    def candidates(self, seen: Tensor, zero: Tensor, shown: Tensor) -> list[Candidates]:
        """Keys and values at every block, the background's last.

        seen (n,N,S,W): CLIP states of n rows' subjects, where ``shown`` (n,N) bool says so; the
        others have the background's tokens. zero (1,S,W): CLIP states of the zero image."""
        background, _ = self.encoder(zero)
        tokens = background.expand(*shown.shape, -1, -1).clone()
        if shown.any():
            encoded, _ = self.encoder(seen[shown])
            tokens[shown] = encoded.to(tokens)
        each: list[Tensor | None] = [*tokens.unbind(1), background]
        made = project(self.projections, self.sites, each, [None] * len(each))
        return [conditions.clip for conditions in made]
