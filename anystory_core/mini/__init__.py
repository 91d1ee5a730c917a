"""The small model that ships with the pack: its sizes, its weights, and how they are made."""
