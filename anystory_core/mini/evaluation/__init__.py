"""The paper's claims as numbers, on the mini model; see :mod:`anystory_core.mini.evaluate`."""
