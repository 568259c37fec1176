"""Benchmarks: each runs both sides in one process group and prints a ratio with its spread."""
