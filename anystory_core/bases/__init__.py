"""What the method needs to know of a base model, one folder for each family."""
