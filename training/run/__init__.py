"""The state of one run: where it is, its checkpoints, and a request to stop it."""
