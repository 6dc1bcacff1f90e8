"""A VM from outside: finding it, its memory map, holding it, the agent in it."""
