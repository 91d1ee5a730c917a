"""Makes and measures the mini model that ships with the pack; no host loads it."""
