"""Feature maps, position by position."""
