"""Training losses and their metrics: one file per family."""
