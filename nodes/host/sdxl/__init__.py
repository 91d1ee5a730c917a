"""What belongs to SDXL in the host."""
