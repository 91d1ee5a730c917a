"""The mini model's world: emoji in drawn places, rendered from seeds, and what is kept of it."""
