"""Publishing checkpoints on the Hugging Face Hub."""
