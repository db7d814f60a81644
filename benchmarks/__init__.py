"""Measurements of the project, run by ``python -m benchmarks``."""
