"""Signals are noted and obeyed later; a second Ctrl-C is obeyed at once; afterwards all is as it was."""

import os
import signal

import pytest

from ml.train.interrupt import Interrupt


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Interrupt() as interrupt:
        assert interrupt.received is None
        send(number)
        assert interrupt.received == number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_term_changes_nothing_and_a_second_ctrl_c_raises():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
