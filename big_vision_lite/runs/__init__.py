"""Manages a run: folder, checkpoints, records, health checks, evaluations."""
