"""Optimizers, schedules and precision."""
