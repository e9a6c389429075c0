"""The parts of `scan`: from folders to records."""
