"""The mini model's networks below AnyStory, each with the phase that trains it."""
