"""Repaired copies of a DreamBooth data set; originals are never touched."""
