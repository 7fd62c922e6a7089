"""Metrics, trackers and timers."""
