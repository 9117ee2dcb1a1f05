"""What this project measures, and against what. Run from a clone: ``python -m benchmarks --help``."""
