"""Toll, on the pixels of an image."""
