"""Make Triton's interpreter compute what a GPU would: bfloat16 and float8 arithmetic, casts, and loops over loaded bounds.

The interpreter keeps bfloat16 as 16-bit integers and multiplies those, truncates where a GPU rounds to nearest, and (with
numpy 2.4 and triton 3.6) cannot loop up to a loaded value. Call :func:`repair` before launching a kernel; doing so twice,
or without ``TRITON_INTERPRET=1``, is harmless. It proves index arithmetic and masks only: races, shared memory and the
shape rules of tensor cores are not checked here.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

_done = False

_UNARY_AND_BINARY = [
    f"create_{name}"
    for name in (
        *("fadd", "fsub", "fmul", "fdiv", "frem", "fneg", "fabs", "fma", "exp", "exp2", "log", "log2", "sqrt", "rsqrt"),
        *("minimumf", "maximumf", "minnumf", "maxnumf", "clampf"),
    )
]
_COMPARE = [f"create_fcmp{order}{op}" for order in "OU" for op in ("LT", "GT", "LE", "GE", "EQ", "NE")]


def repair() -> None:
    """Patch the interpreter of this process, once."""
    global _done
    if _done or os.environ.get("TRITON_INTERPRET") != "1":
        return
    _done = True
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    float8 = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}

    def widen(data: Any, dtype: Any) -> Any:
        """Give float32 values of a small float's bits, or None for other types."""
        data = np.ascontiguousarray(data)
        if dtype == tl.bfloat16:
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if dtype in float8:
            return torch.from_numpy(data.view(np.uint8).copy()).view(float8[dtype][0]).float().numpy()
        return None

    def narrow(data: Any, dtype: Any) -> Any:
        """Round float32 values to a small float's bits."""
        values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32).copy())
        if dtype == tl.bfloat16:
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        kind, top = float8[dtype]
        return values.clamp(-top, top).to(kind).view(torch.uint8).numpy()

    original_convert = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        values = widen(data, source)
        if values is None and source in (tl.float32, tl.float16):
            kind = np.float32 if source == tl.float32 else np.float16
            values = np.ascontiguousarray(data).view(kind).astype(np.float32)
        if values is None:
            return original_convert(data, source, target, rounding)
        if target == tl.bfloat16 or target in float8:
            return narrow(values, target).reshape(data.shape)
        if target == tl.float32:
            return values.view(np.uint32).reshape(data.shape)
        if target == tl.float16:
            return values.astype(np.float16).view(np.uint16).reshape(data.shape)
        return original_convert(data, source, target, rounding)

    def operand(x: Any) -> Any:
        values = widen(x.data, x.dtype.scalar)
        return x.data if values is None else values.reshape(x.data.shape)

    def dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(operand(a), operand(b), dtype=acc.data.dtype)
        return handle(product + acc.data, acc.dtype.scalar)

    def in_float32(name: str) -> None:
        original = getattr(builder, name)

        def compute(self: Any, *args: Any) -> Any:
            small = [isinstance(a, handle) and a.dtype.scalar == tl.bfloat16 for a in args]
            if not any(small):
                return original(self, *args)
            args = tuple(handle(operand(a), tl.float32) if s else a for a, s in zip(args, small))
            result = original(self, *args)
            if result.dtype.scalar != tl.float32:
                return result
            return handle(narrow(result.data, tl.bfloat16).reshape(result.data.shape), tl.bfloat16)

        setattr(builder, name, compute)

    interpreter._convert_float = convert
    builder.create_dot = dot
    for name in [*_UNARY_AND_BINARY, *_COMPARE]:
        if hasattr(builder, name):
            in_float32(name)

    original_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *args: Any) -> Any:
        result = original_patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patch_tensor
