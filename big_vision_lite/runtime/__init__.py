"""Devices, mesh, processes and compilers; independent of models and training."""
