"""Fused checkpoints in the formats of other engines."""
