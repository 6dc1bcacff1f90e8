"""The pool of programs in namespaces made by hand, restored by CRIU alone and by ovr."""
