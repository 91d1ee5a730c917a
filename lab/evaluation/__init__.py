"""The paper's claims as numbers, on the mini model; see :mod:`lab.evaluate`."""
