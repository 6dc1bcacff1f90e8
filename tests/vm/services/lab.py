"""Services on lab VMs: dumped, carried from one VM to another, restored by CRIU alone."""

from pathlib import Path

from ovr import lab
from tests.vm.services.base import Service, run


def dump(vm: lab.LabVm, service: Service, pid: int, directory: str) -> None:
    """Have the guest's CRIU dump the service into a directory of the guest, and end it.

    Raises:
        AssertionError: CRIU fails; the message has the end of its log.
    """
    options = " ".join(service.dump_options)
    _criu(vm, f"dump -t {pid} {options}", directory, "dump.log")


def restore_plain(vm: lab.LabVm, service: Service, directory: str) -> None:
    """Have the guest's CRIU restore the service from images in a directory of the guest.

    The VM must be prepared and the files that were carried unpacked.

    Raises:
        AssertionError: CRIU fails; the message has the end of its log.
    """
    _criu(vm, f"restore -d {' '.join(service.restore_options)}", directory, "restore.log")


def pack(vm: lab.LabVm, service: Service, archive: Path) -> None:
    """Fetch the files that the service needs beside its images; call it after the dump."""
    remote = f"/tmp/{service.name}-carried.tar"
    names = " ".join(path.lstrip("/") for path in service.carry)
    run(vm, f"tar -C / --numeric-owner -cf {remote} {names}", timeout=300)
    vm.get(remote, archive)
    run(vm, f"rm {remote}")


def unpack(vm: lab.LabVm, service: Service, archive: Path) -> None:
    """Put those files into a prepared VM.

    To be called before each restore: a service that has been asked has changed its files.
    """
    remote = f"/tmp/{service.name}-carried.tar"
    vm.put(archive, remote)
    run(vm, f"rm -rf {' '.join(service.carry)} && tar -C / -xpf {remote}", timeout=300)
    run(vm, f"rm {remote}")


def _criu(vm: lab.LabVm, words: str, directory: str, log: str) -> None:
    command = f"criu {words} -D {directory} -v2 -o {log}"
    done = vm.sh(f"mkdir -p {directory} && {command}", timeout=600)
    if done.status:
        tail = vm.sh(f"grep -n Error {directory}/{log}; tail -n 25 {directory}/{log}").stdout
        raise AssertionError(f"{command}: {tail.decode(errors='replace')}")
