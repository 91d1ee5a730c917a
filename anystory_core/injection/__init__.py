"""What the subjects change in the model's attention (paper Eq. 5-8)."""
