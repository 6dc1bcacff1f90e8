"""redis with 70 MB of data: one process, five threads, jemalloc; saving forks it."""

from ovr import lab
from tests.vm.services.base import Service


class Redis(Service):
    name = "redis"
    first_pid = 23_000

    def start(self, vm: lab.LabVm) -> int:
        pid = self.launch(
            vm,
            ["redis-server", "--bind", "127.0.0.1", "--port", "6379", "--dir", self.directory,
             "--daemonize", "no", "--save", "", "--rdbcompression", "no"],
        )  # fmt: skip
        self.ask(vm, "load")
        return pid

    def check(self, vm: lab.LabVm) -> None:
        self.ask(vm, "check")
