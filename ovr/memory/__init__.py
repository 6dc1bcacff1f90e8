"""Guest memory: addresses, extents of pages, RAM slots, page tables. Knows no kernel."""
