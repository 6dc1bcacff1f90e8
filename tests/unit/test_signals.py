"""SIGTERM and SIGHUP are taken as a reason to clean up."""

import os
import signal
import threading

import pytest

from ovr.cli.signals import ended_in_order

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_begun_is_taken_back(number):
    cleaned = []
    signal.signal(number, signal.SIG_DFL)  # whatever started us may have had it ignored
    with pytest.raises(SystemExit) as caught, ended_in_order():
        try:
            os.kill(os.getpid(), number)
            pytest.fail("it came to nothing")
        finally:
            cleaned.append(number)
    assert caught.value.code == 128 + number
    assert cleaned == [number]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nohup_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_in_another_thread_nothing_changes():
    found = []

    def run():
        with ended_in_order():
            found.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL] * 2
