"""PostgreSQL with a client in the middle of a transaction.

The tree is a shell, the server with its processes, and a psql. All share memory: shared buffers
are anonymous, a lock against a second server and what parallel queries use are System V segments.
CRIU dumps those with a namespace of their own only, so the tree has one.
"""

from ovr import lab
from tests.vm.services.base import Service, put, run

_AS_POSTGRES = "setpriv --reuid postgres --regid postgres --init-groups"


class Postgres(Service):
    name = "postgres"
    first_pid = 26_000

    def start(self, vm: lab.LabVm) -> int:
        put(vm, self, "postgres.sh", "postgres.conf")
        initdb = "/usr/lib/postgresql/*/bin/initdb --auth=trust --no-sync --wal-segsize=1"
        run(vm, f"cd {self.directory} && chown postgres: . && mkfifo commands && mkdir answers"
                " && chown postgres: answers"
                f" && {_AS_POSTGRES} {initdb} --locale=C.UTF-8 -D data"
                " && cat postgres.conf >> data/postgresql.conf", timeout=600)  # fmt: skip
        pid = self.launch(vm, ["unshare", "--ipc", "sh", f"{self.directory}/postgres.sh"])
        self.ask(vm, "load")
        return pid

    def check(self, vm: lab.LabVm) -> None:
        self.ask(vm, "check")
