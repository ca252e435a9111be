"""Ctrl-C and SIGTERM where there is nothing left to cancel."""

from __future__ import annotations

import signal

import pytest

from anchor_core.commands.training import _signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_step_does_not_break_off_the_saving(number):
    before = signal.getsignal(number)
    with _signals() as orders:
        orders.close()
        signal.raise_signal(number)
        assert signal.getsignal(number) is before  # a second one ends the process
    assert orders.ending is None
