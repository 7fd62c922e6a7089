"""Acceptance length, calibration and samples during training."""
