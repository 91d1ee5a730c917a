"""Weights files: the modules they fill, reading, writing, and making them of public ones."""
