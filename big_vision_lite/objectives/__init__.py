"""Losses as functions of the batch; one file a family."""
