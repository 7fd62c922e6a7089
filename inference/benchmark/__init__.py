"""Measured decoding runs."""
