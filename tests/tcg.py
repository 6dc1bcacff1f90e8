"""A pytest plugin for tests with lab VMs: shows what they say and do; knows a bug of QEMU's TCG.

When a kernel patches its own code, another vCPU may run a stale int3 of the old translation
("Oops: int3"). A test whose guest fell to that runs again, once, with guests of its own. Nothing
else that kills a guest is forgiven.
"""

from collections.abc import Generator

import pytest
from _pytest.runner import runtestprotocol

from ovr.lab import LabVm, ls
from tests.stuck import doings

__all__ = ["Guests"]

_STALE = "Oops: int3"
_AGAIN = "ran again"
_SHOWN = 6000
"""Characters of a console that are worth showing."""


class Guests:
    """The plugin.

    Args:
        prefix: what the names of this process's VMs begin with.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._fell: set[str] = set()
        self._down = LabVm.down

    def pytest_configure(self) -> None:
        """Look at every console before it is gone: a fixture that fails ends its VM."""

        def look_and_end(vm: LabVm) -> None:
            self._look(vm)
            self._down(vm)

        LabVm.down = look_and_end  # type: ignore[method-assign]

    def pytest_unconfigure(self) -> None:
        """Leave the lab as it was."""
        LabVm.down = self._down  # type: ignore[method-assign]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run a test; again, if a guest fell."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        self._fell.clear()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if any(report.failed for report in reports) and self._some_fell():
            # Of all that belongs to an item this comes to the summary, from xdist's workers, too.
            item.user_properties.append((_AGAIN, ", ".join(sorted(self._fell))))
            # Fixtures of the module and the session hold the dead VM, too.
            item.session._setupstate.teardown_exact(None)
            item._initrequest()  # type: ignore[attr-defined]
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which tests ran again: nobody is to believe that all went well."""
        for reports in terminalreporter.stats.values():
            for report in reports:
                names = dict(getattr(report, "user_properties", ())).get(_AGAIN)
                if names and report.when == "call":
                    terminalreporter.line(f"RAN AGAIN {report.nodeid}: stale int3 in {names} (TCG)")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add consoles, and what the guests do, to what is said of a failure."""
        report = yield
        if report.failed:
            for vm in self._ours():
                report.sections.append((f"console of {vm.name}", _console(vm)[-_SHOWN:]))
                if vm.alive:
                    report.sections.append((f"what {vm.name} does", doings(vm)))
        return report

    def _ours(self) -> list[LabVm]:
        return [vm for vm in ls() if vm.name.startswith(self._prefix)]

    def _some_fell(self) -> bool:
        for vm in self._ours():
            self._look(vm)
        return bool(self._fell)

    def _look(self, vm: LabVm) -> None:
        # A boot that fails is tried again under the same name, which is no reason for a test to.
        if vm.name.startswith(self._prefix):
            self._fell.discard(vm.name)
            if not vm.alive and _STALE in _console(vm):
                self._fell.add(vm.name)


def _console(vm: LabVm) -> str:
    return vm.console.read_text(errors="replace") if vm.console.exists() else "(none)"
