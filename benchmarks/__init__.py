"""What ``python -m benchmarks`` measures, one subject a file."""
