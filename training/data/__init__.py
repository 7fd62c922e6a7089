"""From conversations to batches and hidden states."""
