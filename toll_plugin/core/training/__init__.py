"""The one training loop: what fits a network, and several dense ones at once."""
