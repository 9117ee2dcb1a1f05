"""Writing and verifying a packed set."""
