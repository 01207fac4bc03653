"""Weights from and for other libraries: one file a family, found by what they hold."""
