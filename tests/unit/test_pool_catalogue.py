"""The catalogue of the pool: sources, names and pids; the programs themselves run in VMs."""

from tests.vm.conftest import SUITES
from tests.vm.pool import BY_NAME, COMMON, HEADERS, POOL, SOURCES, build

COMM = 15  # bytes that the kernel keeps of a program's name


def test_every_source_is_in_the_catalogue():
    used = {f"{program.source or program.name}.c" for program in POOL}
    beside = {name for name in used if name.startswith("../")}
    assert (used - beside) | {*COMMON, *HEADERS} == {path.name for path in SOURCES.iterdir()}
    assert beside == {"../namespaces/nested.c"}


def test_names_and_pids_are_its_own():
    assert len(BY_NAME) == len(POOL)
    assert [program.number for program in POOL] == list(range(len(POOL)))
    assert all(len(f"pool-{program.name}") <= COMM for program in POOL)
    assert POOL[-1].first_pid < 32_000  # of a pid_max of 32768


def test_suites_are_known():
    for program in POOL:
        assert {*program.unsupported, *program.args} <= {*SUITES, ""}


def test_all_compile():
    assert all(build(program).read_bytes()[:4] == b"\x7fELF" for program in POOL)
