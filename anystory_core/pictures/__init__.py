"""Recorded routes as pictures for people."""
