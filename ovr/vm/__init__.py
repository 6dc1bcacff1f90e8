"""The VM from outside: finding it, its memory map, holds, the lock, blockers."""
