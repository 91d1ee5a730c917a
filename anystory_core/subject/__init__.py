"""Pictures of a subject -> what the model needs of it: cut-out, encoding, files."""
