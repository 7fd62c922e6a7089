"""How large the draft tree of a decode step is."""
