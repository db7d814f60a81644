"""Experiments: what is measured, and the records it leaves."""
