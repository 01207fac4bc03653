"""Kernels for one kind of accelerator; each equals a plain form in `blocks`."""
