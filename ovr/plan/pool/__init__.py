"""The pool in the plan: `layout` chooses the areas that get memory from it, `table` lists them."""
