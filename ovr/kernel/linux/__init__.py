"""Linux's own containers and objects, under the kernel's own names."""
