"""One dump, step by step: docs/architecture.md, section 1, as code."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ovr.attempt.attempt import Attempt
from ovr.attempt.copier import VERIFY_MODES
from ovr.attempt.stopwatch import Stopwatch
from ovr.dump.ahead import work_ahead
from ovr.dump.container import PODMAN, STDOUT, Container, Running
from ovr.dump.export import Export
from ovr.dump.output import DESCRIPTORS, Output, writable
from ovr.dump.parent import Parent
from ovr.dump.plan import tree_to_dump
from ovr.dump.received import Received
from ovr.dump.report import DumpReport, make_report
from ovr.dump.stop import place_pages, save_inside
from ovr.dump.targets import targets_of
from ovr.dump.verify import verify_pages
from ovr.errors import UsageError
from ovr.guest.client.failures import criu_lacked
from ovr.images import ImageSet
from ovr.images.shared import shared_memory
from ovr.memory.extents import total
from ovr.vm.attach import AttachedVm

__all__ = ["dump"]

log = logging.getLogger("ovr.dump")

_STDOUT: Final = 1


def dump(
    vm: AttachedVm,
    tree: int | Container,
    place: Path,
    *,
    agent: str | None = None,
    leave_running: bool = False,
    pre_copies: int = 0,
    verify: str = "sample",
    criu_options: Sequence[str] = (),
    log_level: int = 2,
    timeout: float | None = None,
    watch: Stopwatch | None = None,
) -> DumpReport:
    """Save a running tree of the VM as CRIU's images, and end it or let it run on.

    Args:
        vm: attached.
        tree: the root task, in the guest's initial pid namespace; or a container.
        place: the directory for the images, which has none yet; of a container of podman, the
            archive, which does not exist yet, or `STDOUT`.
        agent: the agent's address; None: as the VM's devices say.
        leave_running: let the tree run on.
        pre_copies: copy pages while the tree runs, in so many rounds, or `AS_MANY_AS_HELP`; 0: do
            not. The images then build on those in subdirectories, as after pre-dumps of CRIU. An
            archive has them in its images.
        verify: compare none of the memory, a ``sample``, or all (``full``).
        criu_options: further options for the guest's ``criu dump``; none for a container.
        log_level: CRIU's ``-v``.
        timeout: seconds that CRIU may take; None: as long as it makes progress.
        watch: continues the times of attaching.

    Raises:
        UsageError: there is no such process or container, or the images cannot be written.
        ArchiveFailed: the container has ended, and its archive is incomplete; the images are kept.
        OvrError: the cause; the tree runs on, and no images are left.
    """
    if verify not in VERIFY_MODES:
        raise UsageError(f"no way to verify called {verify!r}", f"take {', '.join(VERIFY_MODES)}")
    watch = watch or Stopwatch()
    container = tree if isinstance(tree, Container) else None
    with (
        _output(container, place, leave_running) as output,
        ExitStack() as stack,
        Attempt(vm, agent) as attempt,
    ):
        with watch("start"):
            running = _find(tree, attempt)
            pid = running.pid
            tree_to_dump(vm.kernel, pid)
            # An engine's CRIU reads them.
            unread = {} if container else attempt.agent.criu_config()
            parent = Parent(vm.kernel, pid)
            with criu_lacked(unread):
                attempt.start(
                    lambda agent: agent.start_dump(
                        pid, parent.new_images(),
                        criu_options=container.options if container else criu_options,
                        leave_running=leave_running, log_level=log_level, timeout=timeout,
                        engine=container.engine if container else None, name=running.id,
                    )
                )  # fmt: skip
        with watch("ahead"):
            ahead = work_ahead(attempt, pid, output, pre_copies)
            attempt.agent.add_to_parent(parent.new_images())
            ahead.let_stop(attempt.agent)
        with watch("images"), criu_lacked(unread):
            received = Received(output.images, vm.ram.size, also=DESCRIPTORS if container else None)
            held = attempt.begin(
                lambda agent: agent.held(received.save), engine=container is not None
            )
            log.info("the tree is held: pid %d, %d threads", held.root_pid, len(held.tasks))
            received.check_complete()
            placed = place_pages(attempt, received, output.images, ahead, stack)
        with watch("memory"):
            saved = stack.enter_context(ImageSet.open(output.images.path))
            objects = {one.shmid: one for one in shared_memory(saved)}
            outside, inside = save_inside(attempt.agent, placed, objects, output.images)
            targets = [*targets_of(outside, objects, attempt.tree(), attempt.agent)]
            saver = attempt.saver(watch.counter(sum(total(target.pieces) for target in targets)))
            with writable(place):
                saver.save(targets)
        with watch("verify"):
            targets += ahead.unchanged(attempt.agent, stack)
            compared = verify_pages(attempt, targets, verify)
        with watch("commit"), output.committing():
            stats = attempt.commit(output.end)
        if isinstance(output, Export):
            with watch("archive"):
                stats = output.pack()
        else:
            with watch("holes"):
                for one in outside:
                    one.sink.make_holes()
        return make_report(
            running, outside, inside, attempt, stats, watch=watch, left_running=leave_running,
            verified=(verify, compared), unread_config=unread,
            rounds=ahead.pre_copy.rounds if ahead.pre_copy else (),
        )  # fmt: skip


def _output(container: Container | None, place: Path, left_running: bool) -> Output | Export:
    if container is not None and container.engine == PODMAN:
        if place == STDOUT:
            # Packed as podman packs it unless told otherwise.
            place = Path(f"{container.name}.tar.zst")
            return Export(place, left_running=left_running, stream=_STDOUT)
        return Export(place, left_running=left_running)
    return Output(place)


def _find(tree: int | Container, attempt: Attempt) -> Running:
    return Running(tree) if isinstance(tree, int) else tree.find(attempt.agent)
