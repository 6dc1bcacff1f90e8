"""Signals that arrive while the VM is held are handled after the hold.

Python runs its signal handlers between any two bytecodes of the main thread, and they may raise:
``KeyboardInterrupt`` just before a ``try`` would leave the VM held, just after a ``finally`` has
begun would skip the release. And Ctrl-Z stops a process at any point.
"""

import signal
import threading
from types import FrameType
from typing import Any, Final, Self

__all__ = ["DeferredSignals"]

_UNCHANGEABLE: Final = {signal.SIGKILL, signal.SIGSTOP}


class DeferredSignals:
    """Replaces every Python signal handler; a context manager.

    Between `begin` and `end`, signals are recorded; otherwise they reach their handlers. The same
    holds for SIGTSTP without a handler. Does nothing in other threads than the main one, where no
    handlers run.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._noted: list[signal.Signals] = []
        self._deferring = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self.begin()
        for number in signal.valid_signals() - _UNCHANGEABLE:
            handler = signal.getsignal(number)
            if _is_ours(handler) or (number == signal.SIGTSTP and handler == signal.SIG_DFL):
                self._before[signal.Signals(number)] = handler
                signal.signal(number, self._caught)
        try:
            self.end()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.begin()
        self._restore()
        self.end()

    def begin(self) -> None:
        """Record signals from here on."""
        self._deferring = True

    def end(self) -> None:
        """Handle the recorded signals. If a handler raises, the rest waits for the next `end`."""
        self._deferring = False
        while self._noted:
            self._handle(self._noted.pop(0), None)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            self._handle(signal.Signals(number), frame)
        elif number not in self._noted:
            self._noted.append(signal.Signals(number))

    def _handle(self, number: signal.Signals, frame: FrameType | None) -> None:
        handler = self._before[number]
        if _is_ours(handler):
            handler(number, frame)
            return
        # SIGTSTP: stop here, and continue here on SIGCONT.
        ours = signal.signal(number, signal.SIG_DFL)
        try:
            signal.raise_signal(number)
        finally:
            signal.signal(number, ours)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._caught:
                signal.signal(number, handler)


def _is_ours(handler: object) -> bool:
    # A Python function: not SIG_DFL or SIG_IGN, which getsignal() returns, too, and not None.
    return callable(handler) and not isinstance(handler, signal.Handlers)
