"""Measure a calibration file: which candidates are tried, on which texts, and what they score."""
