"""The small model that ships with the pack: its sizes and its weights. How they are made: lab."""
