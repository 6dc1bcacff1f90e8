"""Plan the use of the guest's pool: `layout` chooses the areas, `table` lists them for CRIU."""
