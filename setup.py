"""Build the one native module; all metadata is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

CFLAGS = ["-O3", "-g", "-Wall", "-Wextra", "-Werror"]
# Cython's generated code, not ours, trips these.
CFLAGS += ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-cast-function-type"]
LDFLAGS: list[str] = ["-pthread"]
if os.environ.get("OVR_SANITIZE"):
    CFLAGS += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
    LDFLAGS += ["-fsanitize=address,undefined"]

setup(
    ext_modules=cythonize(
        [
            Extension(
                "ovr._fastcopy",
                ["ovr/_fastcopy.pyx"],
                extra_compile_args=CFLAGS,
                extra_link_args=LDFLAGS,
            )
        ],
        compiler_directives={"language_level": "3", "freethreading_compatible": False},
    )
)
