"""Build the one native module; all metadata is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

CFLAGS = ["-O3", "-g", "-Wall", "-Wextra", "-Werror"]
# Cython's generated code, not ours, trips these.
CFLAGS += ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-cast-function-type"]
# The tracer: C alone, since it runs after a fork.
HOLD = [f"ovr/native/{name}.c" for name in ("hold", "tracer", "tracees", "sigstop", "procfs")]
LDFLAGS: list[str] = ["-pthread"]
if os.environ.get("OVR_SANITIZE"):
    CFLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    CFLAGS += ["-fno-omit-frame-pointer", "-O1"]
    LDFLAGS += ["-fsanitize=address,undefined"]

setup(
    ext_modules=cythonize(
        [
            Extension(
                "ovr._fastcopy",
                ["ovr/_fastcopy.pyx", *HOLD],
                depends=["ovr/native/guard.h", "ovr/native/hold.h", "ovr/native/tracer.h"],
                include_dirs=["ovr/native"],
                extra_compile_args=CFLAGS,
                extra_link_args=LDFLAGS,
            )
        ],
        compiler_directives={"language_level": "3", "freethreading_compatible": False},
    ),
)
