"""The frozen base of a training run, as diffusers and transformers have it."""
