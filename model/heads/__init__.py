"""Draft heads: one file, one kind."""
