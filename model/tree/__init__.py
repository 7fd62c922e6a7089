"""Draft trees: their nodes, their shapes and how they grow."""
