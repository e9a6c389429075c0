"""The parts of `report`, `card` and `show`: counts, tables, pages."""
