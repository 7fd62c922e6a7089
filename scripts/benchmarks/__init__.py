"""Benchmarks that are run by hand, and the report of `headstart bench`."""
