"""Standard library only: what dev.py and the tests need to get, start and talk to a real host."""
