"""Running a pipeline and keeping attention of chosen calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import dit_accel
from dit_accel.adapter import StepInfo
from dit_accel.geometry import TokenGeometry
from dit_accel_eval.inspect.choose import pick, pick_tokens
from dit_accel_eval.inspect.measure import BLOCK, measure, row_count
from dit_accel_eval.inspect.model import Capture, Look, look_bytes
from dit_accel_eval.inspect.seam import Call, Listener
from dit_accel_eval.video import to_uint8

__all__ = ["DEFAULT_BYTES", "capture"]

DEFAULT_BYTES = 1 << 30
_MOST_LAYERS, _MOST_HEADS, _MOST_STEPS = 4, 4, 3
_PICTURE_SIDE = 256
Methods = Sequence["str | dit_accel.Method"]


class _Collector:
    """Keeps what was asked for, within the bound."""

    def __init__(
        self, layers: Any, heads: Any, steps: Any, tokens: int | Sequence[int], methods: int, max_bytes: int
    ) -> None:
        self.layers, self.heads, self.steps, self.tokens = layers, heads, steps, tokens
        self.methods, self.max_bytes = methods, max_bytes
        self.looks: dict[tuple[str, str, int, int], Look] = {}
        self.geometry: TokenGeometry | None = None
        self.sampled: tuple[int, ...] = ()
        self.components = 1

    def chosen_steps(self, step: StepInfo) -> tuple[int, ...]:
        """Steps to look at.

        Raises:
            ValueError: a step does not exist, or the run does not tell how many there are.
        """
        if step.steps is not None:
            return pick("steps", self.steps, step.steps, _MOST_STEPS)
        if self.steps is None or any(s < 0 for s in self.steps):
            raise ValueError(
                f"this pipeline does not tell its number of steps; name them from 0 on, got steps={self.steps}"
            )
        return tuple(sorted(set(self.steps)))

    def wanted(self, method: str, component: str, layers: tuple[int, ...], layer: int, step: StepInfo) -> bool:
        if layer not in layers or step.step is None or step.branch != "cond":
            return False
        return step.step in self.chosen_steps(step) and (method, component, layer, step.step) not in self.looks

    def add(self, method: str, component: str, names: Sequence[str], layers: tuple[int, ...], call: Call) -> None:
        """Measure a call and keep it."""
        if self.geometry is None:
            self.geometry, self.sampled = call.geometry, pick_tokens(self.tokens, call.geometry)
        if call.geometry != self.geometry:
            raise ValueError(f"all calls must have one token grid, got {self.geometry} and {call.geometry}")
        heads = pick("heads", self.heads, call.query.shape[2], _MOST_HEADS)
        self._check_bound(len(heads), len(layers), len(self.chosen_steps(call.step)))
        look = measure(
            call, method=method, component=component, name=names[call.layer], heads=heads, tokens=self.sampled
        )
        self.looks[method, component, call.layer, look.step] = look
        held = sum(one.nbytes for one in self.looks.values())
        if held > self.max_bytes:  # a method with smaller blocks than were reckoned with
            raise ValueError(
                f"the capture holds {held} bytes, more than max_bytes={self.max_bytes}; name fewer heads or steps"
            )

    def _check_bound(self, heads: int, layers: int, steps: int) -> None:
        assert self.geometry is not None
        tokens, sampled = self.geometry.tokens, len(self.sampled)
        each = look_bytes(heads, row_count(tokens), -(-tokens // BLOCK), sampled, tokens)
        needed = each * layers * steps * self.methods * self.components
        if needed > self.max_bytes:
            raise ValueError(
                f"the capture would hold {needed / 2**20:.0f} MiB, more than max_bytes={self.max_bytes / 2**20:.0f} MiB: "
                f"{self.methods} methods x {layers} layers x {steps} steps x {heads} heads, {sampled} sampled of {tokens} "
                "tokens. Name fewer layers, heads or steps, lower tokens, or raise max_bytes"
            )


def _pictures(result: Any, frames: int) -> npt.NDArray[np.uint8] | None:
    """One picture for each frame of tokens, uint8 ``[F, h, w, 3]``; ``None`` where the pipeline did not decode."""
    from PIL import Image

    clips = getattr(result, "frames", None)
    clip = clips[-1] if clips is not None else getattr(result, "images", None)
    if clip is None or isinstance(clip, torch.Tensor):
        return None
    if isinstance(clip, list):
        clip = np.stack([np.asarray(picture) for picture in clip])
    whole = to_uint8(clip)
    chosen = whole[[round(float(i)) for i in np.linspace(0, len(whole) - 1, frames)]]
    height, width = chosen.shape[1:3]
    scale = min(1.0, _PICTURE_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in chosen])


def _run(
    pipe: Any,
    prompt: str,
    method: str | dit_accel.Method,
    plan: Any,
    seed: int,
    kept: _Collector,
    call: Mapping[str, Any],
) -> tuple[Any, list[str]]:
    """One generation; the pipeline's result, and what was asked for and did not happen."""
    name = method if isinstance(method, str) else method.name
    missing: list[str] = []
    options = {"min_tokens": 0} | ({} if plan is None else {"plan": plan})
    with dit_accel.enabled(pipe, method, **options) as handle, ExitStack() as stack:
        kept.components = len(handle.runs)
        listeners = {}
        for component, run in handle.runs.items():
            layers = pick("layers", kept.layers, len(run.layers), _MOST_LAYERS)
            listener = Listener(
                run,
                partial(kept.wanted, name, component, layers),
                partial(kept.add, name, component, run.layers, layers),
            )
            listeners[component] = stack.enter_context(listener), layers
        given = {} if "prompt_embeds" in call else {"prompt": prompt}
        with torch.no_grad():
            result = pipe(**given, generator=torch.Generator("cpu").manual_seed(seed), **{"output_type": "np", **call})
        for component, (listener, layers) in listeners.items():
            for layer in layers:
                if not any(key[:3] == (name, component, layer) for key in kept.looks):
                    missing.append(f"{name}, {component}, layer {layer}: {listener.why_unseen(layer)}")
    return result, missing


def capture(
    pipe: Any,
    prompt: str,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    tokens: int | Sequence[int] = 64,
    seed: int = 0,
    methods: Methods | None = None,
    plans: Mapping[str, Any] | None = None,
    max_bytes: int = DEFAULT_BYTES,
    **call: Any,
) -> Capture:
    """Generate once with each method and keep the attention of some calls: block maps, the blocks kept, and rows.

    Maps are exact softmax mass by block, over at most 192 query blocks; rows are exact attention of the sampled tokens.
    Queries and keys are looked at during their call and not kept. On a transformer that runs the guidance branches one
    after the other, the branch of the prompt is looked at; within a batch, its last element. Short sequences are
    accelerated, too, since looking is what this is for.

    Args:
        pipe: a diffusers pipeline of a supported model, not compiled.
        prompt: what to generate; left out of the call where ``prompt_embeds`` is among the arguments.
        layers: indices of self-attention layers, negative ones from the end; ``None`` is four of them, evenly spread.
        heads: indices of heads; ``None`` is four of them, evenly spread.
        steps: denoising steps; ``None`` is first, middle and last.
        tokens: how many query tokens to sample on a lattice over the grid, or which.
        seed: of the noise.
        methods: names or methods to look at; ``None`` is ``"auto"``. ``"dense"`` shows attention without a plan.
        plans: static plans by method name, see :func:`dit_accel.calibrate`.
        max_bytes: bound of what is kept in host memory, checked at the first call.
        **call: arguments of the pipeline call, such as ``num_inference_steps``; ``output_type="latent"`` leaves out frames.

    Returns:
        The capture; :meth:`Capture.save` keeps it, :func:`write_viewer` shows it.

    Raises:
        ValueError: an index that does not exist, no attention seen, more than ``max_bytes``, or what
            :func:`dit_accel.enable` raises.
    """
    chosen: Methods = ["auto"] if methods is None else list(methods)
    names = [m if isinstance(m, str) else m.name for m in chosen]
    if not chosen or len(set(names)) != len(names):
        raise ValueError(f"methods must have names of their own, at least one, got {names}")
    kept = _Collector(layers, heads, steps, tokens, len(chosen), max_bytes)
    frames, missing = {}, []
    for method, name in zip(chosen, names, strict=True):
        result, lacking = _run(pipe, prompt, method, (plans or {}).get(name), seed, kept, call)
        missing += lacking
        if kept.geometry is not None:
            pictures = _pictures(result, kept.geometry.axes[0])
            if pictures is not None:
                frames[name] = pictures
    if kept.geometry is None:
        raise ValueError("no attention was seen: " + ("; ".join(missing) or "the steps asked for did not happen"))
    settings = {key: value for key, value in call.items() if isinstance(value, bool | int | float | str)}
    settings["pipeline"] = type(pipe).__name__
    return Capture(
        prompt, seed, kept.geometry, kept.sampled, tuple(kept.looks.values()), frames, tuple(missing), settings
    )
