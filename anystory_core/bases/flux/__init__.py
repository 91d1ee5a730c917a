"""FLUX.1: the authors' trained model (57 blocks, Redux tokens, cached references, a router)."""
