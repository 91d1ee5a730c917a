"""The networks that figures are measured with; no part of the model."""
