"""A Java program on OpenJDK: compiled methods, a garbage collector, two dozen threads."""

from ovr import lab
from tests.vm.services.base import Service, put, run

# A runtime has no compiler; Eclipse's is smaller than a development kit. Trixie's script for it,
# ecj, misses one of its two jars.
_COMPILER = (
    "java -XX:TieredStopAtLevel=1 -cp '/usr/share/java/*'"
    " org.eclipse.jdt.internal.compiler.batch.Main"
    " -proc:none -source 17 -target 17"
)


class Jvm(Service):
    name = "jvm"
    first_pid = 27_000

    def start(self, vm: lab.LabVm) -> int:
        put(vm, self, "JvmService.java")
        run(vm, f"cd {self.directory} && {_COMPILER} JvmService.java", timeout=600)
        # Performance data would be a file in /tmp, mapped, to be carried to another VM.
        options = ["-Xmx192m", "-XX:-UsePerfData", "-XX:+UseG1GC", "-XX:ActiveProcessorCount=2"]
        pid = self.launch(vm, ["java", *options, "-cp", self.directory, "JvmService"])
        self.ask(vm, "note", timeout=600)
        return pid

    def check(self, vm: lab.LabVm) -> None:
        self.ask(vm, "check", timeout=600)
