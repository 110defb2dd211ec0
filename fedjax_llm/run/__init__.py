"""A run: its config, what it consists of, its folder and its record."""
