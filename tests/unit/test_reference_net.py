"""ReferenceNet: Table 1's counts, and the graph against diffusers' own U-Net in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig, ReferenceConfig, UNetConfig
from anystory_core.bases.sdxl.names import ldm_to_diffusers
from anystory_core.bases.sdxl.reference_net import ReferenceNet
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.config import QFormerConfig
from anystory_core.training.hosts.sizes import diffusers_unet_config

SMALL = AnyStoryConfig(
    name="small",
    unet=UNetConfig(
        model_channels=32, channel_mult=(1, 2, 2), transformer_depth=(0, 1, 2), middle_depth=2,
        head_dim=16, context_dim=24, adm_channels=32 + 1536,
    ),
    subject_qformer=QFormerConfig(output_dim=24),
    reference=ReferenceConfig(cross_attention=True),
)  # fmt: skip


def count(config: AnyStoryConfig, *, full: bool) -> int:
    net = ReferenceNet(config, full=full, device="meta")
    return sum(p.numel() for p in net.parameters())


def test_table_1() -> None:
    sdxl = AnyStoryConfig.sdxl()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**diffusers_unet_config(sdxl.unet))
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684  # 2.57 B
    assert count(sdxl, full=True) == 2_021_629_764  # 2.02 B
    assert count(sdxl, full=False) < count(sdxl, full=True)


def test_sdxl_features() -> None:
    net = ReferenceNet(AnyStoryConfig.sdxl(), device="meta")
    features = net(torch.zeros(1, 5, 64, 64, device="meta"))
    sites = build_sites(AnyStoryConfig.sdxl().unet)[1:]
    assert len(features) == 69
    for site, feature in zip(sites, features, strict=True):
        assert feature.shape == (1, (64 // site.stride) ** 2, site.channels)


class NoSizes(torch.nn.Module):
    """Stands for SDXL's embedding of sizes: zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], 256, dtype=torch.float64)


SIMPLIFIED = dataclasses.replace(SMALL, reference=ReferenceConfig())


def nets(full: bool, config: AnyStoryConfig = SMALL) -> tuple[UNet2DConditionModel, ReferenceNet]:
    """diffusers' U-Net, and a ReferenceNet with its weights as far as it has a place for them."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**diffusers_unet_config(SMALL.unet)).double().eval()
    net = ReferenceNet(config, full=full, dtype=torch.float64).eval()
    table = ldm_to_diffusers(SMALL)
    source = unet.state_dict()
    for name, target in net.state_dict().items():
        tensor = source[table[name]]
        if target.shape == tensor.shape:
            target.copy_(tensor)
        else:
            target.zero_()
            target[:, :4].copy_(tensor)
    return unet, net


SIZES = pytest.mark.parametrize("size", [(16, 16), (13, 18), (9, 23)])
FULL = pytest.mark.parametrize("full", [False, True])


def norm1_outputs(
    unet: UNet2DConditionModel, latents: Tensor, context: Tensor
) -> dict[int, Tensor]:
    """What enters every block's self-attention, by block number, at timestep 0."""
    seen: dict[int, Tensor] = {}
    for site in build_sites(SMALL.unet):
        norm = unet.get_submodule(f"{site.diffusers}.norm1")
        norm.register_forward_hook(lambda _, __, out, index=site.index: seen.update({index: out}))
    # A zero label vector: the pooled text and the six embedded sizes are one vector in the end, so
    # the embedding itself is replaced.
    unet.add_time_proj = NoSizes()
    added = {"text_embeds": torch.zeros(2, 32).double(), "time_ids": torch.zeros(2, 6)}
    unet(latents, 0, context, added_cond_kwargs=added)
    return seen


def assert_same(features: Sequence[Tensor], seen: dict[int, Tensor]) -> None:
    assert len(features) == len(seen) - 1
    for index, feature in enumerate(features, 2):
        # float64, but the sinusoid of timestep 0 is made in float32 in both: exact all the same.
        assert torch.allclose(feature, seen[index], atol=1e-9), index


@FULL
@SIZES
@torch.no_grad()
def test_features_are_the_u_nets_own_norm1_outputs(size: tuple[int, int], full: bool) -> None:
    """With text blocks kept and a mask channel of weight zero, ReferenceNet is the U-Net itself."""
    unet, net = nets(full)
    latents, mask = torch.randn(2, 4, *size).double(), torch.rand(2, 1, *size).double()
    context = torch.randn(2, 7, 24).double()
    seen = norm1_outputs(unet, latents, context)
    assert_same(net(torch.cat((latents, mask), dim=1), context), seen)


@FULL
@SIZES
@torch.no_grad()
def test_the_simplified_graph_is_the_u_net_whose_text_attention_adds_nothing(
    size: tuple[int, int], full: bool
) -> None:
    """Eq. 3 without cross-attention: the same blocks, but for attn2 and its norm."""
    unet, net = nets(full, SIMPLIFIED)
    for site in build_sites(SMALL.unet):
        out = unet.get_submodule(f"{site.diffusers}.attn2.to_out.0")
        for parameter in out.parameters():
            parameter.zero_()
    latents, mask = torch.randn(2, 4, *size).double(), torch.rand(2, 1, *size).double()
    seen = norm1_outputs(unet, latents, torch.randn(2, 7, 24).double())
    assert_same(net(torch.cat((latents, mask), dim=1)), seen)


@torch.no_grad()
def test_the_mask_is_the_fifth_channel() -> None:
    """Eq. 3 sees the subject's mask: its weight acts on the mask alone."""
    unet, net = nets(False, SIMPLIFIED)
    first = net.state_dict()["input_blocks.0.0.weight"]
    assert first.shape[1] == 5
    latents, mask = torch.randn(1, 4, 9, 8).double(), torch.rand(1, 1, 9, 8).double()
    without = net(torch.cat((latents, mask), dim=1))
    first[:, 4] = first[:, 0]
    moved = latents.clone()
    moved[:, 0] += mask[:, 0]
    with_mask = net(torch.cat((latents, mask), dim=1))
    first[:, 4] = 0
    as_latent = net(torch.cat((moved, mask), dim=1))
    for plain, one, two in zip(without, with_mask, as_latent, strict=True):
        assert torch.allclose(one, two, atol=1e-9) and not torch.allclose(one, plain, atol=1e-3)


@pytest.mark.parametrize("depth", [(0, 1, 2), (1, 1, 2)])
def test_nothing_is_built_that_no_feature_reads(depth: tuple[int, ...]) -> None:
    """Wherever the last block is. A trainer of several processes waits for every gradient."""
    unet = dataclasses.replace(SIMPLIFIED.unet, transformer_depth=depth)
    net = ReferenceNet(dataclasses.replace(SIMPLIFIED, unet=unet))
    features = net(torch.randn(1, 5, 8, 8))
    torch.stack([feature.square().sum() for feature in features]).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_text_blocks_need_text() -> None:
    _, net = nets(False)
    with pytest.raises(ValueError, match="context"):
        net(torch.zeros(1, 5, 8, 8).double())


@torch.no_grad()
def test_recompute_changes_nothing() -> None:
    torch.manual_seed(1)
    net = ReferenceNet(SIMPLIFIED)
    x = torch.randn(1, 5, 8, 8)
    plain = net(x)
    net.recompute = True
    for a, b in zip(plain, net(x), strict=True):
        assert torch.equal(a, b)
