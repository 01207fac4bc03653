"""Training: state, forward pass, step, program, optimizers, cost estimates."""
