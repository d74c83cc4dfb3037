"""Runs jobs one after another in a worker process, so that a job which crashes or hangs costs its own result alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


class JobFailed(Exception):
    """A job that raised, or whose process ended; the message says which."""


class JobLate(Exception):
    """A job that did not answer in time; its process was ended."""


class Worker:
    """A process that runs one job at a time; a new one takes over after a crash or a timeout.

    It is spawned, so that its CUDA context is its own, and in a group of its own, so that the compilers that it starts
    end with it.

    Args:
        environment: variables of the process, from before it imports anything.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment or {}
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def run(self, seconds: float, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Returns what the function, which can be imported by name, returns in the worker.

        Raises:
            JobFailed: the function raised, or its process ended.
            JobLate: it took longer than `seconds`.
        """
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            before = dict(os.environ)
            os.environ.update(self._environment)
            try:
                self._process.start()
            finally:
                if self._environment:
                    os.environ.clear()
                    os.environ.update(before)
            theirs.close()
        assert self._connection is not None
        try:
            self._connection.send((function, args, options))
            if not self._connection.poll(max(0.0, seconds)):
                self.close()
                raise JobLate(f"no answer for {seconds:.0f} s; its process was ended")
            worked, result, alive = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise JobFailed(self._say_how_it_ended()) from None
        if not alive:
            self.close()
        if not worked:
            raise JobFailed(result)
        return result

    def close(self) -> None:
        """Ends the process and what it started, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None and process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def _say_how_it_ended(self) -> str:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        self._process = None
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the process ended with {how}"


def _serve(connection: Connection) -> None:
    """Runs jobs until the other end is closed; answers each with (worked, result or message, alive)."""
    os.setsid()
    while True:
        try:
            function, args, options = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(*args, **options)
        except Exception as error:
            traceback.print_exc()
            answer = False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        connection.send((*answer, _device_lives()))


def _device_lives() -> bool:
    """Returns whether the GPU still answers: after an illegal access every later call of the process fails."""
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True
