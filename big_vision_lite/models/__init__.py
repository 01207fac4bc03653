"""Model files: one a family, each reads like its paper."""
