"""From a chunk's bytes to micro-batches: what `training.chunk_data` is made of."""
