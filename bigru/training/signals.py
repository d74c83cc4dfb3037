"""Signals that ask a run to stop: it finishes its step, writes its checkpoint and says how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: the terminal is gone, as when an SSH connection breaks. SIGUSR1: Slurm's warning before it ends a job.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command; `signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class StopRequest:
    """Remembers the first signal, to be asked for between two steps; a second one raises Interrupted at once."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that came; 0: none."""

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        _leave_lost_terminal()
        if self.signal:
            raise Interrupted(number)
        self.signal = number


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """Raises Interrupted: nothing is under way that has to be finished."""
    _leave_lost_terminal()
    raise Interrupted(number)


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has these signals handled for as long as the block runs.

    One that is ignored, as in the background of a script, stays so; threads other than the main one get no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # None: a handler that was not set from Python, which could not be put back.
    taken = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _leave_lost_terminal() -> None:
    """Points stdout and stderr at nothing where they are a terminal that is gone: any write would end the run."""
    for stream in (1, 2):
        try:
            # Fails on such a terminal, though nothing is written.
            os.write(stream, b"")
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream)
            os.close(nothing)
