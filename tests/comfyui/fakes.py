"""Stand-ins for what ComfyUI does around an attention override, in its old (0.3.64) and new (0.35 to 0.38) contract.

Written from the contract, see ``docs/comfyui.md``: a patcher that copies its options deeply, wrappers and callbacks, the
attention function with its override, a sampler that merges options for each call, and models of Wan's and FLUX's shape.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Container:
    """A tensor with one owner, as new versions hand them to attention."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "taken twice"
        return tensor


def dense_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kw
):  # type: ignore[no-untyped-def]
    """Dense attention in ComfyUI's form."""
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=kw.get("scale"), enable_gqa=bool(kw.get("enable_gqa"))
    )
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention(*args: Any, **kwargs: Any) -> Any:
    """``optimized_attention``: looks for an override and hands it the function below."""
    kwargs["_inside_attn_wrapper"] = True
    options = kwargs.get("transformer_options") or {}
    override = options.get("optimized_attention_override")
    contained = isinstance(args[0], Container)
    if contained and override is not None and hasattr(override, "container_function"):
        return override.container_function(*args, **kwargs)
    if contained:
        args = tuple(a.take() for a in args[:3]) + args[3:]
    if override is not None:
        return override(dense_attention, *args, **kwargs)
    return dense_attention(*args, **kwargs)


class Executor:
    """Calls wrappers one inside the other, the model's own forward last."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any], place: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.place = original, class_obj, wrappers, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Executor(self.original, self.class_obj, self.wrappers, self.place + 1).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.place == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.place](self, *args, **kwargs)


def wrapped(model: Any, options: dict[str, Any]) -> Executor:
    found = options.get("wrappers", {}).get("diffusion_model", {})
    return Executor(model._forward, model, [w for several in found.values() for w in several])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.heads = heads


class WanBlock(Attention):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.text = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, context: Tensor, core: str, options: dict[str, Any]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if core == "new":
            q, k, v = Container(q), Container(k), Container(v)
        x = x + attention(q, k, v, heads=self.heads, transformer_options=options)
        k, v = self.text(context).chunk(2, -1)
        return x + 0.1 * attention(x, k, v, heads=self.heads, transformer_options=options)


class WanModel(nn.Module):
    """Self-attention of the video alone, heads by keyword, a cross-attention beside it."""

    def __init__(self, core: str, heads: int = 2, dim: int = 64, blocks: int = 2, twice: tuple[int, ...] = ()) -> None:
        super().__init__()
        width = heads * dim
        self.core, self.patch_size, self.twice = core, (1, 2, 2), twice
        self.ref_conv = None
        self.skip: set[int] = set()
        self.patch_embedding = nn.Conv3d(4, width, (1, 2, 2), stride=(1, 2, 2))
        self.blocks = nn.ModuleList(WanBlock(width, heads) for _ in range(blocks))
        self.head = nn.ConvTranspose3d(width, 4, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):  # type: ignore[no-untyped-def]  # noqa: B006
        return wrapped(self, transformer_options).execute(
            x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs
        )

    def _forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):  # type: ignore[no-untyped-def]  # noqa: B006
        x = self.patch_embedding(x)
        grid = x.shape[2:]
        h = x.flatten(2).transpose(1, 2)
        if self.core == "new":
            transformer_options["grid_sizes"], transformer_options["block_type"] = grid, "double"
        for i, block in enumerate(self.blocks):
            if self.core == "new":
                transformer_options["block_index"] = i
            for _ in range(2 if i in self.twice else 1):
                if i not in self.skip:
                    h = block(h, context, self.core, transformer_options)
        return self.head(h.transpose(1, 2).unflatten(2, grid))


class FluxBlock(Attention):
    def forward(self, x: Tensor, core: str, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if core == "new":
            q, k, v = Container(q), Container(k), Container(v)
        return x + attention(q, k, v, self.heads, skip_reshape=True, mask=mask, transformer_options=options)


class Flux(nn.Module):
    """Text, image and reference tokens in one sequence; heads by position."""

    def __init__(self, core: str, heads: int = 2, dim: int = 64, blocks: tuple[int, int] = (1, 2)) -> None:
        super().__init__()
        width = heads * dim
        self.core, self.patch_size = core, 2
        self.img_in = nn.Conv2d(4, width, 2, stride=2)
        self.double_blocks = nn.ModuleList(FluxBlock(width, heads) for _ in range(blocks[0]))
        self.single_blocks = nn.ModuleList(FluxBlock(width, heads) for _ in range(blocks[1]))
        self.out = nn.ConvTranspose2d(width, 4, 2, stride=2)

    def forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):  # type: ignore[no-untyped-def]
        return wrapped(self, transformer_options).execute(
            x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs
        )

    def _forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):  # type: ignore[no-untyped-def]
        rows, columns = (-(-size // 2) for size in x.shape[2:])
        padded = F.pad(x, (0, columns * 2 - x.shape[3], 0, rows * 2 - x.shape[2]))
        parts = [context, *(self.img_in(z).flatten(2).transpose(1, 2) for z in (padded, *(ref_latents or ())))]
        h = torch.cat(parts, 1)
        mask = kwargs.get("attention_mask")
        for kind, blocks in (("double", self.double_blocks), ("single", self.single_blocks)):
            for i, block in enumerate(blocks):
                if self.core == "new":
                    transformer_options["block_type"], transformer_options["block_index"] = kind, i
                h = block(h, self.core, mask, transformer_options)
        image = h[:, context.shape[1] :][:, : rows * columns]
        return self.out(image.transpose(1, 2).unflatten(2, (rows, columns)))[..., : x.shape[2], : x.shape[3]]


class UNetModel(nn.Module):
    """A model that cannot be accelerated."""

    def forward(self, x, timesteps=None, context=None):  # type: ignore[no-untyped-def]
        return x


class FlowSampling:
    """Rectified flow without a shift: sigma falls from 1 to 0."""

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0:
            return 999999999.9
        return 0.0 if percent >= 1 else 1.0 - percent


class Patcher:
    """A model patcher: options are copied deeply, wrappers and callbacks by reference."""

    def __init__(self, model: nn.Module, core: str) -> None:
        self.model, self.core = model, core
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.callbacks: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> Patcher:
        other = Patcher(self.model, self.core)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(w) for key, w in keyed.items()} for kind, keyed in self.wrappers.items()}
        other.callbacks = {kind: {key: list(c) for key, c in keyed.items()} for kind, keyed in self.callbacks.items()}
        return other

    def get_model_object(self, name: str) -> Any:
        return {"diffusion_model": self.model, "model_sampling": FlowSampling()}[name]

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def add_callback_with_key(self, kind: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def call_back(self, kind: str, *args: Any) -> None:
        for several in self.callbacks.get(kind, {}).values():
            for callback in several:
                callback(self, *args)


@dataclass
class Prompt:
    """One conditioning: text ``[1, L, C]``, and what else the model is called with."""

    text: Tensor
    more: dict[str, Any]
    uuid: uuid.UUID


def prompt(length: int, width: int, seed: int, **more: Any) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(torch.randn(1, length, width, generator=generator), more, uuid.uuid4())


@torch.no_grad()
def sample(
    patcher: Patcher,
    noise: Tensor,
    prompts: list[Prompt],
    steps: int = 5,
    *,
    batched: bool = False,
    sigmas: Tensor | None = None,
    each: Callable[[int, dict[str, Any]], None] | None = None,
    windows: int = 1,
) -> Tensor:
    """Euler steps; conditionings in one batch or one after the other, as ComfyUI's sampler decides by free memory."""
    sigmas = torch.linspace(1, 0, steps + 1) if sigmas is None else sigmas
    model_options = copy.deepcopy(patcher.model_options)  # the guider's own copy: closures in it are shared
    base = model_options["transformer_options"]
    base["wrappers"], base["callbacks"] = patcher.wrappers, patcher.callbacks
    base["sample_sigmas"] = sigmas
    x = noise.clone()
    try:
        for i in range(len(sigmas) - 1):
            timestep = sigmas[i].expand(1)
            extra = (model_options,) if patcher.core == "new" else ()
            patcher.call_back("on_prepare_state", timestep, *extra)
            if each is not None:
                each(i, base)
            groups = [list(range(len(prompts)))[::-1]] if batched else [[j] for j in range(len(prompts))]
            found: dict[int, Tensor] = {}
            for group in groups:
                for _ in range(windows):
                    options = dict(base)
                    options["cond_or_uncond"], options["uuids"] = group, [prompts[j].uuid for j in group]
                    options["sigmas"] = timestep
                    out = patcher.model(
                        torch.cat([x] * len(group)),
                        timestep.expand(len(group)),
                        torch.cat([prompts[j].text for j in group]),
                        transformer_options=options,
                        **prompts[group[0]].more,
                    )
                found.update(zip(group, out.chunk(len(group)), strict=True))
            velocity = found[0] if len(prompts) == 1 else found[1] + 2.0 * (found[0] - found[1])
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    finally:
        patcher.call_back("on_cleanup")
    return x
