"""What a user sees in the terminal: progress, tables, charts."""
