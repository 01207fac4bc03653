"""What learns: state, forward pass, step, program, optimizers, costs."""
