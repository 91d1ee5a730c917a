"""Public weights -> an AnyStory file."""
