"""One target in Python under libFuzzer: ``python -m tests.fuzz.worker TARGET [libFuzzer options]``.

With ``OVR_FUZZ_NATIVE`` the extension is taken from there instead of from the package.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
from types import ModuleType

import atheris

NATIVE = "ovr._fastcopy"


class BuiltForThis(importlib.abc.MetaPathFinder):
    """Finds the extension that was built with sanitizers."""

    def find_spec(
        self, name: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != NATIVE:
            return None
        return importlib.util.spec_from_file_location(name, os.environ["OVR_FUZZ_NATIVE"])


def main() -> None:
    name, *options = sys.argv[1:]
    if "OVR_FUZZ_NATIVE" in os.environ:
        sys.meta_path.insert(0, BuiltForThis())
    logging.disable()
    with atheris.instrument_imports(include=["ovr"]):
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415 - only now it is instrumented
    run = TARGETS[name].run

    def one(data: bytes) -> None:
        run(data)

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
