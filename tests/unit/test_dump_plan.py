"""The plan of a dump, from a toy kernel's structures: what is read outside, and what is not."""

import json

import pytest

from ovr import cli
from ovr.cli import dump
from ovr.dump import plan
from ovr.dump.plan import Mapping, Reason, judge, plan_dump
from ovr.errors import UsageError
from ovr.kernel import Kernel, find_task
from tests.unit.kernel.test_kernel import mapped
from tests.unit.kernel.toy import DIRECT_MAP, ToyKernel, toy_btf
from tests.unit.machine import Machine

READ, WRITE, SHARED, MAYSHARE, PFNMAP, IO, HUGETLB = 1, 2, 8, 0x80, 0x400, 0x4000, 0x400000
VMEMMAP, STRUCT_PAGES = DIRECT_MAP + (1 << 40), 0x70_0000  # GVA, GPA
FREE = 0x740  # the first frame that nothing uses
OPS = 1  # of an area that is not anonymous from the start
UPTODATE, ANON, KSM = 1 << 3, 1, 3
EXT4, TMPFS, HUGETLBFS, AIO = 0xEF53, 0x01021994, 0x958458F6, 0xA10A10A1


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (Mapping(0x1000, 0x2000, READ | WRITE, anonymous=True), Reason.OUTSIDE),
        (Mapping(0x1000, 0x2000, READ, file=True, magic=EXT4), Reason.OUTSIDE),
        (Mapping(0x1000, 0x2000, READ), Reason.OUTSIDE),  # the vDSO
        (Mapping(0x1000, 0x2000, READ | PFNMAP | IO), None),  # vvar
        (Mapping(0x1000, 0x2000, WRITE, anonymous=True), Reason.UNREADABLE),
        (Mapping(0x1000, 0x2000, 0, anonymous=True), Reason.UNREADABLE),
        (Mapping(0x20_0000, 0x40_0000, READ | HUGETLB, file=True, memory=True), Reason.HUGETLB),
        (Mapping(0x1000, 0x2000, READ | MAYSHARE, file=True, memory=True), None),
        (Mapping(0x1000, 0x2000, READ, file=True, memory=True), Reason.OUTSIDE),
        (Mapping(0x1000, 0x2000, READ | SHARED | MAYSHARE, file=True, magic=EXT4), None),
        (Mapping(0x1000, 0x2000, READ | SHARED | MAYSHARE, file=True, magic=AIO), Reason.AIO_RING),
        (Mapping(1 << 47, 1 << 48, READ | WRITE, anonymous=True), Reason.HIGH),
        (Mapping(0x1000, (1 << 47) - 0x1000, READ, anonymous=True), Reason.OUTSIDE),
        (Mapping(0x1000, 1 << 47, READ, anonymous=True), Reason.HIGH),
    ],
)
def test_verdicts(one, reason):
    assert judge(one) is reason


def test_every_reason_has_a_text_and_a_place():
    assert {reason.where for reason in Reason} == {"outside", "inside", "lost"}
    assert all(reason.where == "outside" for reason in Reason if reason.twice)
    assert len({reason.text for reason in Reason}) == len(Reason)


class Guest(ToyKernel):
    """A toy kernel with files, and processes with pages."""

    def __post_init__(self):
        super().__post_init__()
        for at in range(0, 0x2_0000, 4096):
            self.machine.map(VMEMMAP + at, STRUCT_PAGES + at)
        self.frame = FREE

    def file(self, magic, *, by_kernel=False, size=0, seals=0):
        block, info, file = self.allocate(16), self.allocate(32), self.allocate(8)
        inode = info + 8
        self.poke(info, "I", seals)
        self.poke(block, "QQ", by_kernel << 22, magic)
        self.poke(inode + 8, "QQ", block, size // 512)
        self.poke(file, "Q", inode)
        return file

    def pages(self, gva, count, mapping=ANON):
        """Map pages to frames whose struct pages have this mapping."""
        for at in range(gva, gva + 4096 * count, 4096):
            self.machine.map(at, self.frame << 12)
            where = DIRECT_MAP + STRUCT_PAGES + 64 * self.frame
            self.poke(where, "QQQQ", UPTODATE, 0, 0, mapping)
            self.frame += 1


@pytest.fixture(params=[False, True], ids=["percpu", "old"])
def guest(request, tmp_path):
    return Guest(Machine.build(tmp_path), btf=toy_btf(old_rss=request.param))


def planned(guest, pid=700):
    return plan_dump(Kernel.find(guest.machine.ram), pid)


def areas_of(task):
    return [(one.start, one.end, one.size, one.reason) for one in task.areas]


def objects_of(found):
    return [(one.size, one.pids, one.reason) for one in found.shared]


def test_a_process(guest):
    heap, code, shm, ring = 0x1_0000, 0x40_0000, 0x60_0000, 0x70_0000
    memory = guest.file(TMPFS, by_kernel=True, size=0x6000)
    mm = mapped(guest, [
        (heap, heap + 0x20_0000, READ | WRITE, 0, 0, 0),
        (code, code + 0x1_0000, READ, 0, guest.file(EXT4), OPS),
        (code + 0x1_0000, code + 0x1_4000, 0, 0, 0, 0),
        (code + 0x2_0000, code + 0x2_4000, READ | WRITE, 0, 0, 0),  # nothing in it
        (shm, shm + 0x4000, READ | MAYSHARE, 0, memory, OPS),
        (ring, ring + 0x2000, READ | MAYSHARE, 0, guest.file(AIO, by_kernel=True), OPS),
        (ring + 0x4000, ring + 0x8000, READ | PFNMAP | IO, 0, 0, OPS),
        (ring + 0x8000, ring + 0xA000, READ, 0, 0, OPS),
    ])  # fmt: skip
    guest.pages(heap, 3)
    guest.pages(heap + 0x3000, 1, KSM)
    guest.pages(heap + 0x4000, 2, 0)  # the page of zeros
    guest.pages(heap + 0x1_0000, 5)
    guest.pages(code, 4, 0xFFFF_8880_0000_1000)  # the file's
    guest.pages(code + 0x4000, 1)  # a copy
    guest.pages(code + 0x1_1000, 2)
    guest.pages(shm, 1, 0xFFFF_8880_0000_2000)
    guest.pages(ring + 0x4000, 1, 0)
    guest.poke(mm + 32 + 8 * 2, "Q", 9)
    found = planned(guest)
    [task] = found.tasks
    assert (task.pid, task.comm, task.threads) == (700, "mapped", (700,))
    assert areas_of(task) == [
        (heap, heap + 0x20_0000, 9 * 4096, Reason.OUTSIDE),
        (code, code + 0x1_0000, 4096, Reason.OUTSIDE),
        (code + 0x1_0000, code + 0x1_4000, 2 * 4096, Reason.UNREADABLE),
        (ring, ring + 0x2000, 0x2000, Reason.AIO_RING),
        (ring + 0x8000, ring + 0xA000, 0x2000, Reason.OUTSIDE),
    ]
    assert task.swapped == 9 * 4096
    assert objects_of(found) == [(0x6000, (700,), Reason.SHARED)]
    assert (found.bytes_outside, found.bytes_inside) == (22 * 4096, 0)
    assert (found.bytes_total, found.bytes_written_twice) == (22 * 4096, 10 * 4096)
    assert found.by_reason() == {
        Reason.OUTSIDE: 12 * 4096, Reason.SHARED: 0x6000, Reason.UNREADABLE: 2 * 4096,
        Reason.AIO_RING: 0x2000,
    }  # fmt: skip


def test_a_tree_that_shares_memory(guest):
    memory = guest.file(HUGETLBFS, by_kernel=True, size=4 << 20)
    mounted = guest.file(TMPFS, size=1 << 20)
    ranges = [
        (0x20_0000, 0x60_0000, READ | MAYSHARE | HUGETLB, 0, memory, OPS),
        (0x60_0000, 0x80_0000, READ | MAYSHARE, 0, mounted, OPS),
        (0x80_0000, 0xC0_0000, READ | MAYSHARE | HUGETLB, 0, memory, OPS),
    ]
    mapped(guest, ranges)
    parent = find(guest, 700)
    child = guest.fork(701, "child", parent=parent)
    guest.poke(child + 160, "Q", guest.peek(parent + 160))
    guest.fork(702, "zombie", parent=child)
    guest.fork(703, "other")
    found = planned(guest)
    assert [(task.pid, task.areas) for task in found.tasks] == [(700, ()), (701, ()), (702, ())]
    assert objects_of(found) == [(4 << 20, (700, 701), Reason.SHARED)]


def find(guest, pid):
    return find_task(Kernel.find(guest.machine.ram), pid).address_


def test_memfds(guest):
    """One that is sealed, and one that is mapped privately, with a page of the task's own."""
    sealed = guest.file(TMPFS, by_kernel=True, size=0x4000, seals=8)
    plain = guest.file(TMPFS, by_kernel=True, size=0x3000, seals=1)
    mapped(guest, [
        (0x1_0000, 0x1_4000, READ | MAYSHARE, 0, sealed, OPS),
        (0x2_0000, 0x2_3000, READ | WRITE, 0, plain, OPS),
    ])  # fmt: skip
    guest.pages(0x2_0000, 1, 0xFFFF_8880_0000_2000)
    guest.pages(0x2_1000, 1)
    found = planned(guest)
    assert objects_of(found) == [
        (0x4000, (700,), Reason.SEALED), (0x3000, (700,), Reason.SHARED),
    ]  # fmt: skip
    assert areas_of(found.tasks[0]) == [(0x2_0000, 0x2_3000, 4096, Reason.OUTSIDE)]
    assert (found.bytes_inside, found.bytes_outside) == (0x4000, 0x4000)


def test_pages_in_slices(guest, monkeypatch):
    """Page tables are walked piece by piece, whatever an area claims."""
    monkeypatch.setattr(plan, "_SLICE", 0x2000)
    mapped(guest, [
        (0x1_0000, 0x1_5000, READ, 0, 0, 0), (0x1_5000, 0x1_6000, READ | WRITE, 0, 0, 0),
        (0x2_0000, 0x2_3000, READ, 0, 0, 0),
    ])  # fmt: skip
    guest.pages(0x1_0000, 6)
    guest.pages(0x2_1000, 2)
    [task] = planned(guest).tasks
    assert [one.size for one in task.areas] == [5 * 4096, 4096, 2 * 4096]


def test_no_such_process(guest):
    with pytest.raises(UsageError, match="no process 4242"):
        planned(guest, 4242)


def test_a_kernel_thread(guest):
    thread = guest.fork(50, "kthreadd")
    guest.poke(thread + 8, "I", 0x0020_0000)  # PF_KTHREAD
    with pytest.raises(UsageError, match="pid 50 is a kernel thread"):
        planned(guest, 50)


def test_a_dry_run_reads_only(guest, monkeypatch, capsys):
    mapped(guest, [(0x1_0000, 0x2_0000, READ | WRITE, 0, 0, 0)])
    guest.pages(0x1_0000, 3)
    asked = []

    class Vm:
        kernel = Kernel.find(guest.machine.ram)

        def __init__(self, spec, **options):
            asked.append((spec, options))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(dump, "AttachedVm", Vm)
    words = ["dump", "--dry-run", "--vm", "qmp:/x", "-t", "700"]
    assert cli.main(words) == 0
    assert asked == [("qmp:/x", {"vmlinux": None})]  # not writable
    out = capsys.readouterr().out
    assert "outside: 12.0 KiB of 12.0 KiB (100.00%)" in out
    assert "pid 700 'mapped', 1 threads" in out
    assert cli.main([*words, "-v"]) == 0
    assert "0x10000  0x20000  12.0 KiB  outside  outside" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ovr.dump.plan/1"
    assert document["tasks"][0]["areas"] == [
        {"start": 0x1_0000, "end": 0x2_0000, "bytes": 12288, "where": "outside",
         "reason": "outside", "text": "read from outside"},
    ]  # fmt: skip
