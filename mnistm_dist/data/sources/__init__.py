"""What can be packed: anything on disk, opened as a `Source` of labelled images."""
