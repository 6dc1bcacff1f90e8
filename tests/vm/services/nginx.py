"""nginx: a master and four workers, with sockets and memory that they share."""

from ovr import lab
from tests.vm.services.base import Service, put


class Nginx(Service):
    name = "nginx"
    first_pid = 24_000

    def start(self, vm: lab.LabVm) -> int:
        put(vm, self, "nginx.conf")
        self.ask(vm, "make")
        pid = self.launch(vm, ["nginx", "-c", f"{self.directory}/nginx.conf"])
        self.ask(vm, "note")
        return pid

    def check(self, vm: lab.LabVm) -> None:
        self.ask(vm, "check")
