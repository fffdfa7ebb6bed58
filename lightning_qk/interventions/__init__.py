"""Remedies as plain functions: they change weights, attention calls or losses. No Lightning."""
