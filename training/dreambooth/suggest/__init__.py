"""A run.toml for a file of concepts and a card: `python -m training suggest`."""
