"""Operators' glue, run as `python -m scripts.NAME`. No logic of its own."""
