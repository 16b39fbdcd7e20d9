"""Work spread by its number over processes that ``torchrun`` or ``accelerate launch`` start; they share a folder only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dit_accel_eval.files import write_text
from dit_accel_eval.runs.errors import EvalError

__all__ = ["Ranks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes:
        rank: number of this process.
        world: number of processes.
        local: number of this process on its machine, which is the number of its GPU.
        patience: seconds without a new file after which another process counts as lost.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    patience: float = 3600.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise EvalError(f"RANK must lie in 0..WORLD_SIZE-1, got RANK={self.rank} and WORLD_SIZE={self.world}")

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Ranks:
        """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; without them there is one process.

        Raises:
            EvalError: they are no numbers, or do not fit.
        """
        env = os.environ if env is None else env
        try:
            numbers = {name: int(env.get(name, default)) for name, default in _VARIABLES.items()}
            patience = float(env.get("DIT_ACCEL_EVAL_PATIENCE", "3600"))
        except ValueError as error:
            raise EvalError(f"{', '.join(_VARIABLES)} must be whole numbers: {error}") from None
        return cls(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], patience)

    def mine(self, items: Sequence[T]) -> list[T]:
        """The items whose number belongs to this process."""
        return list(items[self.rank :: self.world])

    def begin(self, folder: Path) -> None:
        """Take back what an earlier process of this rank said of its end."""
        _failure(folder, self.rank).unlink(missing_ok=True)

    def failed(self, folder: Path, error: BaseException) -> None:
        """Tell the others that this process ends without its work."""
        if self.world == 1:
            return
        with suppress(OSError):  # a full disk must not hide what happened
            write_text(_failure(folder, self.rank), f"{type(error).__name__}: {error}\n", owner=f"r{self.rank}")

    def wait(self, folder: Path, missing: Callable[[], Sequence[Path]], what: str) -> None:
        """Wait until other processes have written their files.

        Args:
            folder: of the run.
            missing: tells the files that are not there yet.
            what: what is waited for, in words.

        Raises:
            EvalError: another process failed, or no file came for :attr:`patience` seconds.
        """
        began = changed = time.monotonic()
        started = time.time()
        count, pause = -1, 0.05
        while left := missing():
            if len(left) != count:
                count, changed = len(left), time.monotonic()
            # A mark from before this process may be of an earlier launch: its rank takes it back when it starts.
            late = time.monotonic() - began > _GRACE
            self._check_failures(folder, 0.0 if late else started, what)
            if time.monotonic() - changed > self.patience:
                raise EvalError(
                    f"waited {time.monotonic() - began:.0f} s for {what} of other processes, {len(left)} are missing, "
                    f"such as {left[0]}; all finished samples are kept: start the same command again"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0)

    def _check_failures(self, folder: Path, since: float, what: str) -> None:
        """End what cannot be waited for: a process that has said since ``since`` (seconds of the epoch) that it failed."""
        for other in range(self.world):
            path = _failure(folder, other)
            if other != self.rank and path.is_file() and path.stat().st_mtime > since:
                reason = path.read_text(encoding="utf-8").strip()
                raise EvalError(f"process {other} failed while {what} were waited for: {reason}")


_GRACE = 60.0
_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def _failure(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"{rank}.failed"
