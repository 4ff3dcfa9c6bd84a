"""A folder per operation: ``reference.py`` (plain, obviously right), faster twins, one dispatch."""
