"""One file a family and library: names and layouts of their arrays."""
