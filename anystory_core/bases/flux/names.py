"""Which of diffusers' modules stand behind each branch.

diffusers keeps q, k, v and the feed-forward layer of a block apart where ComfyUI fuses them; the
branches of a fused layer are listed in the order of its output rows. Only modules whose branches
the authors' code ever switches on are here: the first feed-forward layer of a double block, the
time and text embeddings and the last layer are not.
"""

from __future__ import annotations

from .config import FluxTransformerConfig
from .sites import build_sites

Sources = dict[str, tuple[str, ...]]  # branch in our file -> diffusers modules, one for each slice

_SINGLE: Sources = {
    "modulation": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_IMAGE: Sources = {
    "modulation": ("norm1.linear",),
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj": ("attn.to_out.0",),
    "mlp": ("ff.net.2",),
}
_TEXT: Sources = {
    "modulation": ("norm1_context.linear",),
    "qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "proj": ("attn.to_add_out",),
    "mlp": ("ff_context.net.2",),
}


def _stream(transformer: FluxTransformerConfig, entry: str, double: Sources) -> Sources:
    found: Sources = {"input": (entry,)}
    for site in build_sites(transformer):
        for branch, modules in (double if site.kind == "double" else _SINGLE).items():
            found[f"{site.host}.{branch}"] = tuple(f"{site.diffusers}.{m}" for m in modules)
    return found


def reference_sources(transformer: FluxTransformerConfig) -> Sources:
    """Of the reference stream: the image side of the transformer (343 modules for FLUX.1)."""
    return _stream(transformer, "x_embedder", _IMAGE)


def router_sources(transformer: FluxTransformerConfig) -> Sources:
    """Of the router's stream: the text side (343 modules)."""
    return _stream(transformer, "context_embedder", _TEXT)
