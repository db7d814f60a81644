"""What things cost: seconds, bytes, imports."""
