"""Questions about the method, each with a protocol of its own."""
