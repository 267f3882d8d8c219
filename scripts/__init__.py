"""What measures, checks and packages the project; run from its root as ``python -m scripts.NAME``."""
