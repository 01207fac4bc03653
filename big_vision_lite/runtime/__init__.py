"""The machine that a run computes on; nothing here knows what it computes."""
