"""Training data: what a sample is, where it lies, how it is written and checked."""
