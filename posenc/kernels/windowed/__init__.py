"""Backends on attention libraries that take a sliding window: segments as bands of the causal plane."""
