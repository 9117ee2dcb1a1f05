"""Write and verify a packed set."""
