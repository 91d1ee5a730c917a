"""SDXL and models of its shape."""
