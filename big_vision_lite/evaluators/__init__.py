"""Evaluators that score a train state, one file each."""
