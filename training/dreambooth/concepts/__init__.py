"""Concept lists of other trainers, read even when they are broken, and written as ours."""
