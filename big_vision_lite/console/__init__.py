"""Shows progress, tables and charts in the terminal."""
