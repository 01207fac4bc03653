"""How a recipe is read, overridden by flags, checked for mistakes and recorded."""
