"""Context parallelism of diffusers: a sequence on several processes, attention by heads.

``transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=N))`` shards the tokens and tells the attention
processors. Where one of ours is told, its operator sends queries, keys and values to the processes of their heads, lets the
run carry out the call as if there were one process, and sends the output back. Shards of a ring are exchanged in the same
way, over all processes of the ring and of Ulysses together, and the status says so: docs/multi_gpu.md has the arithmetic of
memory and traffic against diffusers' ring, which gathers all keys and values on every process. What cannot be exchanged
goes to the user's own backend, which knows the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.arguments import argument
from dit_accel_patches.parallel_exchange import Arrival, Ranks, Streams
from dit_accel_patches.parallel_heads import SharedHeads

__all__ = ["Spread", "find_config", "update"]

#: Attention on tensors ``[B, S, H, D]`` and a mask, as one process has them.
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

_HOOK = "cp_input---"
_TEXT = "encoder_hidden_states"


def find_config(places: Iterable[Any]) -> Any:
    """The parallel configuration in the first place that has one, ``None`` without context parallelism.

    diffusers puts it on the transformer and on its attention processors.
    """
    for place in places:
        config = getattr(place, "_parallel_config", None)
        if getattr(config, "context_parallel_config", None) is not None:
            return config
    return None


class Spread:
    """One transformer on several processes.

    Attributes:
        config: diffusers' parallel configuration.
        ranks: the processes that share the sequence.
    """

    def __init__(self, config: Any, module: nn.Module) -> None:
        self.config = config
        self._context = config.context_parallel_config
        self.ranks = Ranks.of(self._context._flattened_mesh.get_group())
        self._note = _ring_note(getattr(self._context, "ring_degree", 1), self.ranks.size)
        self._split = _split_names(module)
        self._streams: Streams | str = "the transformer was not entered through its forward"
        self._shares: dict[tuple[int, torch.device], SharedHeads] = {}

    def begin(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], geometry: TokenGeometry | str
    ) -> None:
        """Start of a forward call: how its sequence is sharded."""
        text = argument(module, args, kwargs, _TEXT) if _TEXT in self._split else None
        length = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
        lengths = _stream_lengths(geometry, length)
        self._streams = lengths if isinstance(lengths, str) else Streams(self.ranks, lengths)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, handle: Any, here: Attend, as_is: Attend
    ) -> Tensor:
        """Attention of this process's tokens ``[B, S / N, H, D]``, in and out.

        Args:
            query: tokens of this process.
            key: like ``query``.
            value: like ``query``.
            mask: of the keys, of this process's alone or of all.
            handle: the layer.
            here: attention on all tokens of some heads.
            as_is: the user's backend, which does the parallel part itself.
        """
        run, streams = handle.state.run, self._streams
        reason = self._why_not(query, key, value, mask)
        if reason is not None or isinstance(streams, str):
            run.decline(handle.index, reason or streams)
            return as_is(query, key, value, mask)
        share = self._share_of(run, handle.index, query, mask)
        under_way: list[Arrival] = []
        for x in (query, key, value):
            if len(under_way) == 2:
                under_way[0].wait()  # what was sent then makes room for what is packed next; the wires stay busy
            under_way.append(streams.to_heads(share.deal(x, 2), share.counts))
        if mask is not None and mask.shape[-1] != streams.tokens:
            mask = streams.whole_mask(mask)
        q, k, v = (arrival.wait() for arrival in under_way)
        out = here(q, k, v, mask)
        del q, k, v
        out = share.collect(streams.to_tokens(out, share.counts), 2)
        blended = getattr(run, "blended", None)
        return out if blended is None else blended(out, value, handle.index)

    def _share_of(self, run: Any, layer: int, query: Tensor, mask: Tensor | None) -> SharedHeads:
        """The heads that this process computes: those of the plan in force, for a start an even part in their order."""
        key = query.shape[2], query.device
        if key not in self._shares:
            self._shares[key] = SharedHeads(self.ranks, *key)
        share = self._shares[key]
        if hasattr(run, "spread"):
            if self._note and all(text != self._note for text, _ in run.ledger.flags):
                run.ledger.flag(self._note, torch.tensor(False))
            placed = run.placement(layer, query.shape[0], mask is not None)
            share = share if placed is None or placed.total != query.shape[2] else placed
            run.spread(share)
        return share

    def _why_not(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
        """Reason why a call is not exchanged, or ``None``."""
        streams, size = self._streams, self.ranks.size
        if isinstance(streams, str):
            return f"context parallelism: {streams}"
        tokens = query.shape[1]
        if query.shape != key.shape or key.shape != value.shape:
            return f"context parallelism: query {tuple(query.shape)} and key {tuple(key.shape)} differ"
        if query.shape[2] < size:
            return (
                f"context parallelism: {query.shape[2]} heads cannot be dealt out to {size} processes; use at most "
                f"{query.shape[2]}"
            )
        if tokens != streams.here:
            return (
                f"context parallelism: this process has {tokens} tokens of the sequence, and by its streams of "
                f"{' and '.join(map(str, streams.lengths))} tokens it should have {streams.here}"
            )
        if mask is None:
            return None
        of_keys = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[-2] == 1)
        whole = mask.shape[-1] == streams.tokens and len(streams.lengths) == 1
        if not of_keys or not (whole or mask.shape[-1] == tokens) or (mask.ndim == 4 and mask.shape[1] != 1):
            return f"context parallelism: attention mask of shape {tuple(mask.shape)}"
        return None


def update(
    known: Spread | None,
    places: Iterable[Any],
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    geometry: TokenGeometry | str,
) -> Spread | None:
    """How a transformer is spread at the start of a forward call, ``None`` if it is not."""
    config = find_config(places)
    if config is None:
        return None
    if known is None or known.config is not config:
        known = Spread(config, module)
    known.begin(module, args, kwargs, geometry)
    return known


def _ring_note(ring: int, size: int) -> str:
    """What is executed where a ring was asked for, empty where none was."""
    if ring <= 1:
        return ""
    return f"ring_degree={ring}: sparse attention exchanges heads over all {size} processes, no ring is run"


def _split_names(module: nn.Module) -> frozenset[str]:
    """Arguments that diffusers' hooks split, wherever in the transformer they sit."""
    names: set[str] = set()
    for part in module.modules():
        hooks = getattr(part.__dict__.get("_diffusers_hook"), "hooks", {})
        for name, hook in hooks.items():
            if name.startswith(_HOOK):
                names.update(key for key in hook.metadata if isinstance(key, str))
    return frozenset(names)


def _stream_lengths(geometry: TokenGeometry | str, text: int) -> tuple[int, ...] | str:
    """Tokens of each sharded stream in the order of the sequence.

    Args:
        geometry: of the whole sequence.
        text: tokens of a text stream that is sharded on its own, 0 without one.
    """
    if isinstance(geometry, str):
        return f"the sequence cannot be put in order, since its geometry is not known ({geometry})"
    if not geometry.extra or not text:
        return (geometry.tokens,)
    rest = geometry.tokens - text
    if geometry.prefix == text:
        return text, rest
    if geometry.suffix == text and not geometry.prefix:
        return rest, text
    return f"the sequence cannot be put in order: {text} text tokens do not fit {geometry}"
