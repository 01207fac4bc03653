"""A run on disk and over time: folder, checkpoints, records, health, evaluations."""
