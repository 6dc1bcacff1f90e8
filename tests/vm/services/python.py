"""A Python program with a dozen threads that compute, pass work on, wait and wake."""

from ovr import lab
from tests.vm.services.base import Service, put


class Python(Service):
    name = "python"
    first_pid = 25_000

    def start(self, vm: lab.LabVm) -> int:
        put(vm, self, "python_service.py")
        pid = self.launch(vm, ["python3", f"{self.directory}/python_service.py"])
        self.ask(vm, "note")
        return pid

    def check(self, vm: lab.LabVm) -> None:
        self.ask(vm, "check")
