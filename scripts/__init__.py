"""Measure, check and package the project; run from its root as ``python -m scripts.NAME``."""
