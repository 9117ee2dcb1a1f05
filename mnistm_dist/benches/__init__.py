"""What ``python -m mnistm_dist.bench`` measures, one subject a file."""
