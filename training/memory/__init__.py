"""How much memory a run needs, before it starts: `python -m training plan --memory`."""
