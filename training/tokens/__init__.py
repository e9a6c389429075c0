"""Single tokens that are trained: which they are, how they lie over a text model's table, and their files."""
