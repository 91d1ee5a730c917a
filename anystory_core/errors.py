"""Errors a user can act on: each message says what was given, what was expected, and the remedy."""

from __future__ import annotations


class AnyStoryError(ValueError):
    """Base of all errors raised by this project on purpose. Nodes prefix it with their name."""


class ConfigError(AnyStoryError):
    """A configuration value is missing, unknown or out of range."""


class CheckpointError(AnyStoryError):
    """A weights file is not one of ours, is damaged, or does not fit its own configuration."""


class SubjectError(AnyStoryError):
    """A picture, mask or encoded subject cannot be used."""


class DataError(AnyStoryError):
    """Training data, or what it is made from, cannot be used as it is."""


class RoutingError(AnyStoryError):
    """The subjects, masks and router at hand do not give a route."""


class ModelMismatchError(AnyStoryError):
    """A model of the host (U-Net, VAE, CLIP vision) has other sizes than the AnyStory weights."""
