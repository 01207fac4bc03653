"""Reads recipes, overrides them by flags, explains mistakes and records them."""
