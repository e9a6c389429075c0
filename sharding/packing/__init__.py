"""The parts of `pack`: from planned rows to shards."""
