"""A process that runs jobs on the device: one order a line on stdin, answers as lines of JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import correctness, floors, forecaster, rivals
from benchmarks.gpu_record import Row
from benchmarks.machine import Cpu, Gpu, Machine
from benchmarks.parts import Report

# How each job is done: once for each part, or for all parts together.
BY_PART: dict[str, Callable[..., list[Row]]] = {
    "machine": lambda machine, rows: [rows[0] | machine.describe()],
    "correctness": correctness.check,
    "planted defect": correctness.planted_defect,
    "graph capture": correctness.graph_capture,
    "ragged batch": correctness.ragged_batch,
    "sanitizer": correctness.sanitizer,
    "facts": floors.fact,
}
TOGETHER: dict[str, Callable[..., None]] = {
    "layer": rivals.layer,
    "recurrence": rivals.recurrence,
    "training step": forecaster.training_step,
    "epoch": forecaster.epoch,
}


def serve(order: dict[str, Any], machine: Machine, report: Report) -> None:
    """Does one job."""
    do, parts, args = order["do"], order["parts"], order["args"]
    if do in TOGETHER:
        TOGETHER[do](machine, parts, report, **args)
    else:
        for part in parts:
            with report.part(part):
                report.finish(part, BY_PART[do](machine, parts[part], **args))
    machine.forget()
    report.say({"done": True})


def main() -> None:
    """Serves until there are no more orders."""
    # Whatever else is printed goes to stderr, and only answers to stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    # Several workers share the processors; what they do on the CPU is small.
    torch.set_num_threads(1)
    machine = Cpu() if "--cpu" in sys.argv[1:] else Gpu()

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    for line in sys.stdin:
        order = json.loads(line)
        serve(order, machine, Report(order["parts"], machine, say))


if __name__ == "__main__":
    main()
