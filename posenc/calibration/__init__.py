"""Parameters that were chosen for a model by measurement: candidates, the calibration file, recommendations."""
