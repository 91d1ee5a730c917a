"""What the glue does for FLUX alone."""
