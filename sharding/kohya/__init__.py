"""Folders and metadata of kohya's sd-scripts, both ways."""
