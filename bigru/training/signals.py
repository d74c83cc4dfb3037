"""SIGINT and SIGTERM: a run that is told to stop finishes its step, and then says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        if self.signal:
            raise Interrupted(number)
        self.signal = number


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """Raises Interrupted: nothing is under way that has to be finished."""
    raise Interrupted(number)


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has SIGINT and SIGTERM handled for as long as the block runs.

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
