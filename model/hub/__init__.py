"""Publishing checkpoints."""
