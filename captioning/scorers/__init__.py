"""Image or record → one raw number. One file per kind of model."""
