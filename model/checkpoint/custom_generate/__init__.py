"""Decoding code that a fused checkpoint carries for programs without Headstart."""
