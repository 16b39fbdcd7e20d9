"""Which block an attention call belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

__all__ = ["BlockNames", "Numbering"]


class BlockNames:
    """Numbers and names of the self-attentions of a model; kept for a run.

    Newer versions of ComfyUI say which block runs. A block that attends twice (VACE's side branch) gets a further number.
    Where nothing is said, calls are counted.

    Args:
        lists: names of the block lists, in the order in which they run.
        counts: number of blocks in each.
    """

    def __init__(self, lists: tuple[str, ...], counts: list[int]) -> None:
        self._offsets = [sum(counts[:i]) for i in range(len(counts))]
        self._names = [f"{name}.{i}" for name, count in zip(lists, counts, strict=True) for i in range(count)]
        self._extra: dict[tuple[int, int], int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each number."""
        return tuple(self._names)

    def block(self, options: Mapping[str, Any]) -> int | None:
        """Number of the block that runs, counted through all lists, or ``None`` if ComfyUI does not say it."""
        index = options.get("block_index")
        if not isinstance(index, int):
            return None
        single = options.get("block_type") == "single" and len(self._offsets) > 1
        return index + (self._offsets[1] if single else 0)

    def layer(self, block: int, again: int) -> int:
        """Number of the self-attention: that of its block, or a new one for further calls in a block."""
        if again:
            if (block, again) not in self._extra:
                self._extra[block, again] = len(self._names)
                self._names.append(f"{self.name(block)} (call {again + 1})")
            return self._extra[block, again]
        return block

    def name(self, block: int) -> str:
        """Name of a block."""
        while block >= len(self._names):
            self._names.append(f"block {len(self._names)}")
        return self._names[block]


class Numbering:
    """Counts the self-attentions of one forward call."""

    def __init__(self, names: BlockNames) -> None:
        self._names = names
        self._calls = 0
        self._seen: Counter[int] = Counter()

    def next(self, options: Mapping[str, Any]) -> tuple[int, int]:
        """Block and layer number of the call that comes."""
        block = self._names.block(options)
        if block is None:
            block, self._calls = self._calls, self._calls + 1
            self._names.name(block)
            return block, block
        self._names.name(block)
        again, self._seen[block] = self._seen[block], self._seen[block] + 1
        return block, self._names.layer(block, again)
