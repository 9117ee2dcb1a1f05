"""A signal handler only records the request; the second Ctrl-C exits."""

import os
import signal

import pytest

from mnistm_dist.errors import UserError
from mnistm_dist.training import preemption as signals
from mnistm_dist.training.preemption import StopRequest, parse_signals


@pytest.fixture
def stop():
    """Install the handlers, and restore the previous ones afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    request = StopRequest((signal.SIGTERM, signal.SIGUSR1))
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_by_name(stop, number):
    assert stop.reason is None
    os.kill(os.getpid(), number)
    assert stop.reason == number.name


def test_the_first_signal_is_the_reason_and_later_ones_are_ignored_at_the_end(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    stop.close(process_ends=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.reason == "SIGTERM"
    # Nor does its default action apply, which would kill the process while the interpreter ends.
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_a_second_interrupt_exits_at_once_unless_a_launcher_forwarded_the_first(stop, monkeypatch):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(signals, "SECOND_INTERRUPT_AFTER", 0.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest((signal.SIGHUP,))
    request.install()
    os.kill(os.getpid(), signal.SIGHUP)
    request.close(process_ends=False)
    signal.signal(signal.SIGHUP, before)
    assert request.reason is None


def test_signals_are_parsed_by_name():
    assert parse_signals("SIGTERM, SIGUSR1") == (signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGNONE", "TERM", "15"])
def test_a_signal_that_cannot_be_caught_is_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        parse_signals(name)
