"""Measurements of what DESIGN section 10 sets bars for; `python -m scripts.bench NAME`."""
