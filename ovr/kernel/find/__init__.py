"""Finding a guest's kernel in its RAM, its symbols and its types."""
