"""What a state is worth: one file an evaluator."""
