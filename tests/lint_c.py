"""Analyze C files with clang-tidy, each with the flags it is compiled with."""

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from ovr.guest.wire import header

AGENT = ("-std=c11", "-D_GNU_SOURCE", "-DOVR_LAB", "-Iovr/guest", "-Itests/fuzz/c")
OTHERS = (
    "-std=gnu11", "-D_GNU_SOURCE=", "-Iovr/guest", "-Itests/subject", "-Itests/vm/programs/pool",
    f"-I{sysconfig.get_path('include')}",
)  # fmt: skip
STAND_IN = "static const unsigned char warm_library[] = {0};\n"
"""In place of the compiled library, whose own sources are analyzed."""


def flags(path: Path, generated: str) -> list[str]:
    agent = path.parent in (Path("ovr/guest"), Path("tests/fuzz/c"))
    return ["-Wall", "-Wextra", *(AGENT if agent else OTHERS), f"-I{generated}"]


def analyze(path: Path, generated: str) -> bool:
    """Print the findings in one file; return whether there are none."""
    tidy = Path(sys.prefix, "bin", "clang-tidy")
    command = [tidy, "--quiet", path, "--", *flags(path, generated)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout or done.stderr, end="", flush=True)
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Analyze sources; headers are analyzed where they are included."""
    sources = [path for path in map(Path, names) if path.suffix == ".c"]
    with tempfile.TemporaryDirectory() as generated:
        Path(generated, "protocol.h").write_text(header())
        Path(generated, "warm_library.h").write_text(STAND_IN)
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            accepted = list(executor.map(analyze, sources, repeat(generated)))
    return 0 if all(accepted) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
