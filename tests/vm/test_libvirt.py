"""A libvirt domain, found by name, looked into, restored into; libvirtd is the test's own."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ovr import lab
from ovr.lab import demo
from ovr.lab.qemu import Hardware
from tests.documents import block, commands, run, said
from tests.vm.conftest import PREFIX, SIZE, UMASK
from tests.vm.libvirt_host import VSOCK, WHY_NOT, domain, domain_xml, libvirtd, virsh

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
NAME = f"{PREFIX}libvirt"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The URI of a libvirtd, which virsh and so ovr ask by default."""
    with libvirtd(tmp_path_factory.mktemp("libvirtd")) as uri, pytest.MonkeyPatch.context() as env:
        env.setenv("LIBVIRT_DEFAULT_URI", uri)
        yield uri


@pytest.fixture(scope="module")
def vm(host, dumps, tmp_path_factory):
    """A running domain; as a lab VM, to run commands in it."""
    dumps["trixie"]  # made first: not three VMs at once
    directory = tmp_path_factory.mktemp("domain")
    with domain(host, NAME, directory) as agent:
        hardware = Hardware(1 << 30, 2, "tcg", None, 1)
        yield lab.LabVm(
            NAME, "trixie", hardware, directory, agent, agent, directory / "console", ()
        )


def command(*words):
    return run(f"ovr {' '.join(words)}", Path("/"))


def test_it_is_listed_and_usable(vm):
    found = json.loads(command("list", "--json"))["vms"]
    [one] = [each for each in found if each["name"] == NAME]
    assert one["names"] == [f"libvirt:{NAME}"]
    assert (one["state"], one["usable"], one["agent"]) == ("running", True, vm.agent)
    assert 0.99 < one["memory"] / (1 << 30) <= 1


def test_ps(vm):
    names = command("ps", "--vm", f"libvirt:{NAME}")
    assert "ovr-agent" in names
    assert "[kthreadd]" in names


def test_restore_as_documented(vm, dumps, host, tmp_path):
    dump = dumps["trixie"]
    demo.prepare(vm)
    (tmp_path / "images").symlink_to(dump.path)
    documented = said(block("docs/libvirt.md", "ovr list"), {"DOMAIN": NAME})
    lists, checks, restores = commands(documented)
    assert f"libvirt:{NAME}" in run(lists, tmp_path)
    assert run(checks, tmp_path).endswith("Looks good.\n")
    restores = said(restores, {"ovr restore": "ovr restore --json --verify full"})
    report = json.loads(run(restores, tmp_path))
    assert report["bytes_outside"] / report["bytes_total"] >= 0.99
    answer = demo.answer_of(vm, dump.pid)
    assert (answer.words, answer.wrong, int(answer.umask, 8)) == (SIZE // 8, 0, UMASK)
    assert virsh(host, "domstate", NAME).strip() == "running"


def test_a_suspended_domain_is_refused_and_named(vm, host):
    virsh(host, "suspend", NAME)
    try:
        [one] = [each for each in json.loads(command("list", "--json"))["vms"]
                 if each["name"] == NAME]  # fmt: skip
        assert not one["usable"]
        assert "virsh resume" in one["problem"]["hint"]
    finally:
        virsh(host, "resume", NAME)


def test_a_domain_with_vsock(host, tmp_path):
    """This host may have no vhost-vsock to start it with; libvirt knows what QEMU would get."""
    name = f"{NAME}-vsock"
    (tmp_path / "domain.xml").write_text(domain_xml(name, tmp_path, VSOCK))
    virsh(host, "define", str(tmp_path / "domain.xml"), "--validate")
    try:
        xml = ElementTree.fromstring(virsh(host, "dumpxml", name))
        assert xml.find("devices/vsock/cid").attrib["auto"] == "yes"
        assert "vhost-vsock" in virsh(host, "domxml-to-native", "qemu-argv", "--domain", name)
    finally:
        virsh(host, "undefine", name)
