"""The mini recipe's parts: whitened latents, the host's key names, resumed phases."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from anystory_core.bases.sdxl.config import AnyStoryConfig
from devkit.graphs import INPUTS
from lab.networks import vae as vae_module
from lab.networks.base import build_unet, reading_place, spread_timesteps
from lab.networks.clip import Clip
from lab.networks.text import END, LENGTH, START, tokenize
from lab.phase import Phase
from lab.world.emoji import Emoji


def test_whitening_changes_the_latents_scale_and_nothing_else() -> None:
    torch.manual_seed(0)
    vae = vae_module.build_vae()
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(0.3)  # small latents: the soft clamp is not felt
        vae.encoder.layers[-1].bias.add_(0.1)
    pixels = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decoder.layers[0](vae.encode(pixels).latents)
        vae_module.whiten(vae, pixels)
        latents = vae.encode(pixels).latents
        after = vae.decoder.layers[0](latents)
    flat = latents.movedim(1, -1).reshape(-1, 4)
    # statistics are taken in bfloat16 (3 digits), so they hold to about a percent
    assert flat.mean(dim=0).abs().max() < 0.02
    assert (torch.cov(flat.t()) - torch.eye(4)).abs().max() < 0.02
    # the zero padding at the border stands for another latent than before: inner pixels only
    assert torch.allclose(before[..., 1:-1, 1:-1], after[..., 1:-1, 1:-1], atol=1e-5)


def test_the_decoder_goes_on_and_latents_stay(tmp_path: Path) -> None:
    names = ("t_rex", "mushroom", "parrot")
    subjects = [Emoji(n, n, n, INPUTS / f"anystory_{n}.png") for n in names]
    begun = vae_module.build_vae()
    torch.save(begun.state_dict(), tmp_path / "vae.whitened.pt")
    vae_module.train_decoder(subjects, tmp_path, steps=2)
    trained = vae_module.load_vae(tmp_path)
    before, after = begun.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    vae_module.train_decoder(subjects, tmp_path, steps=2)  # done already
    again = vae_module.load_vae(tmp_path).state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_timesteps_cover_the_schedule() -> None:
    t = spread_timesteps(20, "v", torch.Generator().manual_seed(0))
    assert sorted(int(x) // 50 for x in t) == list(range(20))
    assert t.tolist() != sorted(t.tolist())


def test_noisy_timesteps_lie_more_closely_where_the_noise_is_predicted() -> None:
    t = spread_timesteps(16, "epsilon", torch.Generator().manual_seed(0))
    slices = ((1 - (t.float() + 0.5) / 1000).sqrt() * 16).long()
    assert sorted(slices.tolist()) == list(range(16))
    assert (t >= 750).sum() == 8  # u < 1/2


def test_a_subject_is_read_in_its_outline_in_a_loose_box_or_everywhere() -> None:
    region = torch.zeros(16, 16)
    region[5:8, 6], region[6, 5:9] = 1, 0.5  # a cross
    rng = np.random.default_rng(0)
    areas = set[int]()
    for _ in range(200):
        where = reading_place(region, alone=False, rng=rng)
        assert (where >= region).all()  # the subject itself always reads
        areas.add(int((where > 0).sum()))
        rows, columns = torch.nonzero(where.any(1))[:, 0], torch.nonzero(where.any(0))[:, 0]
        assert rows[0] >= 1 and rows[-1] <= 11 and columns[0] >= 1 and columns[-1] <= 12
    assert 6 in areas and len(areas) > 20 and 256 not in areas
    alone = [reading_place(region, alone=True, rng=rng).mean() == 1 for _ in range(200)]
    assert 70 < sum(alone) < 130


def test_tokens_are_padded_with_the_end_token() -> None:
    rows = tokenize(["a red apple", ""])
    assert rows.shape == (2, LENGTH)
    assert rows[0, 0] == START and rows[0, 4] == END and (rows[0, 4:] == END).all()
    assert rows[1].tolist() == [START] + [END] * (LENGTH - 1)


def test_text_embedding_ignores_padding_length() -> None:
    """embed_texts cuts the padding away; the whole length must give the same vectors."""
    torch.manual_seed(1)
    clip = Clip([320, 530, START, END]).eval()
    rows = torch.tensor([[3, 1, 2, 4] + [4] * 73, [3, 1, 4] + [4] * 74])
    with torch.no_grad():
        short = clip.embed_texts(rows)
        full = nn.functional.normalize(clip.text(input_ids=rows).text_embeds, dim=-1)
    assert torch.allclose(short, full, atol=1e-5)


def test_resumed_phase_equals_one_run(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    def run(module: nn.Module, folder: Path, stop_at: int | None) -> None:
        def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=generator)
            return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()

        Phase(name="toy", folder=folder, steps=12, learning_rate=0.1, seed=5, ema=0.9).run(
            module, loss_of
        )

    whole = make()
    run(whole, tmp_path / "a", None)
    broken = make()
    with pytest.MonkeyPatch.context() as patch:
        # a checkpoint after every step
        patch.setattr(sys.modules[Phase.__module__], "CHECKPOINT_SECONDS", -1)
        with pytest.raises(KeyboardInterrupt):
            run(broken, tmp_path / "b", 5)
    resumed = make()
    run(resumed, tmp_path / "b", None)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_mini_unet_is_of_the_configured_sizes() -> None:
    config = AnyStoryConfig.mini()
    unet = build_unet()
    count = sum(p.numel() for p in unet.parameters())
    assert 2 * count < 40 * 2**20  # the largest shipped file, in half precision
    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert len(blocks) == 16
    assert unet.config.cross_attention_dim == config.unet.context_dim
