"""Processes that measure one model each: all compile at once, and one measures while the others are stopped."""

from __future__ import annotations

import ctypes
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Worker", "mark", "measure_all", "say"]

#: Seconds that one model may take to measure before the others go on compiling beside it.
_PATIENCE = 45.0
_BEGAN = time.monotonic()


def say(record: dict[str, Any]) -> None:
    """Tell the process that started this one."""
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def mark(text: str) -> None:
    """Tell the log how far this process is, and when."""
    sys.stderr.write(f"[{time.monotonic() - _BEGAN:5.1f} s] {text}\n")


def _die_with_parent() -> None:
    """A stopped process would outlive a parent that is killed, and keep its memory on the GPU."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Worker:
    """One process and what it has said.

    Args:
        name: of its model.
        command: how it is started.
        told: where its records go, ``(name, record)``; ``None`` as record is its end.
    """

    def __init__(self, name: str, command: Sequence[str], told: queue.Queue[tuple[str, dict[str, Any] | None]]) -> None:
        self.name = name
        self.ready = self.over = False
        self.stage = 0
        self.record: dict[str, Any] | None = None
        self._told = told
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_die_with_parent
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._told.put((self.name, json.loads(line)))
        self._told.put((self.name, None))

    def go(self) -> None:
        """Let it measure."""
        assert self._process.stdin is not None
        self.ready = False
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def pause(self, stop: bool) -> None:
        """Stop it, or let it go on."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP if stop else signal.SIGCONT)

    def kill(self) -> None:
        """End it and wait until its memory is free."""
        self._process.kill()
        self._process.wait()


class _Turns:
    """Who measures next, and what was said so far."""

    def __init__(self, workers: dict[str, Worker], began: float, deadline: float) -> None:
        self.workers, self.began, self.deadline = workers, began, deadline
        self.turn: Worker | None = None
        self._since = 0.0

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the deadline."""
        return self.began + share * self.deadline - time.monotonic()

    def take(self, worker: Worker, record: dict[str, Any] | None) -> bool:
        """Note what a worker has said; whether it was a measurement."""
        took = time.monotonic() - self.began
        if record is not None and "ready" in record:
            worker.ready = True
            sys.stderr.write(f"{worker.name} ready after {took:.0f} s\n")
            return False
        if record is not None:
            worker.record = record["known"]
            worker.stage += record["stage_over"]
            worker.over = record["complete"]
        else:
            worker.over = True
        if worker.over:
            sys.stderr.write(f"{worker.name} {'ended' if record is None else 'done'} after {took:.0f} s\n")
            worker.kill()
        if self.turn is worker and (worker.over or (record is not None and record["stage_over"])):
            self.turn = None
            self._pause(False)
        return record is not None

    def next(self) -> None:
        """Give the turn to who has had the fewest, in order; if that one takes long to compile, to whoever is ready."""
        if self.turn is not None:
            if time.monotonic() - self._since > _PATIENCE:
                self._pause(False)
            return
        waiting = sorted((worker for worker in self.workers.values() if not worker.over), key=lambda one: one.stage)
        able = [worker for worker in waiting if worker.ready]
        if able and (able[0] is waiting[0] or self.left(0.45) < 0):
            self.turn, self._since = able[0], time.monotonic()
            self._pause(True)
            self.turn.go()

    def _pause(self, stop: bool) -> None:
        for worker in self.workers.values():
            if worker is not self.turn and not worker.over:
                worker.pause(stop)


def measure_all(
    commands: dict[str, list[str]], deadline: float, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Measure models, in the order of ``commands``, each in a process of its own.

    Args:
        commands: how the worker of each model is started.
        deadline: seconds for everything; what is under way then is told as far as it got.
        keep: given all records whenever there is a new number.

    Returns:
        A record for each model of which anything was measured.
    """
    told: queue.Queue[tuple[str, dict[str, Any] | None]] = queue.Queue()
    workers: dict[str, Worker] = {}
    turns = _Turns(workers, time.monotonic(), deadline)

    def records() -> list[dict[str, Any]]:
        known = [(name, worker) for name, worker in workers.items() if worker.record is not None]
        return [{"case": name, "complete": worker.over, **(worker.record or {})} for name, worker in known]

    try:
        for name, command in commands.items():
            workers[name] = Worker(name, command, told)
        while turns.left() > 0 and not all(worker.over for worker in workers.values()):
            turns.next()
            try:
                name, record = told.get(timeout=min(max(turns.left(), 0.01), 1.0))
            except queue.Empty:
                continue
            if not workers[name].over and turns.take(workers[name], record):
                keep(records())
    finally:
        for worker in workers.values():
            worker.kill()
    return records()
