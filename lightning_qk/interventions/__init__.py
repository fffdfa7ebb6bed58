"""Changes of a model that steer what its attention does, as plain functions."""
