"""C types from BTF, and typed views of guest memory."""
