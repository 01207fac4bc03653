"""Sets up devices, mesh, processes and compilers; knows no model and no training."""
