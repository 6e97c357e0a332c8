"""Benchmarks, and the table of results."""
