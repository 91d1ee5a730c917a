"""The mini model in other layouts: a training folder, the shipped files, public files."""
