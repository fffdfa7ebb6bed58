"""Changes of a model that steer what its attention does, as plain functions."""

"""Remedies as plain functions: they change weights, attention calls or losses. No Lightning."""
