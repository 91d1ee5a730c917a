"""Both training stages of the paper (3.4): ``python -m anystory_core.training run.toml``."""
