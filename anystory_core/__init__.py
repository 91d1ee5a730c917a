"""AnyStory in plain torch: the paper's modules, without any host. See ``build`` and ``run``."""
