"""What `mnistm_dist.data.packing` is made of: the cutting of splits, the spool, tars, lineage, the staging."""
