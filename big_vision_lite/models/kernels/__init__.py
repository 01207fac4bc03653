"""Kernels for one kind of accelerator, each beside the plain form that it equals."""
