"""The training loss and where its labels come from."""
