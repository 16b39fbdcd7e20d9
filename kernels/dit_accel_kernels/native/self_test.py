"""Whether what ``again.c`` launches arrives on the device, asked once a process."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

__all__ = ["self_test"]

_NUMBER = 0  # no layer is running while this is asked


def self_test(module: Any) -> str | None:
    """Why the module cannot be used on the current device, or ``None``."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _moves(torch.device("cuda", torch.cuda.current_device())) or _launches(module)
    except Exception as error:  # whatever a driver or a compiler of another version says
        return f"its self-test raised {type(error).__name__}: {error}".splitlines()[0]


def _moves(device: torch.device) -> str | None:
    """Whether a descriptor of the copy engine that is moved is the one that would have been made there."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return None
    from triton.runtime import driver

    from .packing import descriptor

    x, y = (torch.empty(4096, dtype=torch.bfloat16, device=device) for _ in range(2))
    rest = (3, 2, 9, [16, 64], [64, 64], [64, 1], 0)
    one, other = (descriptor(driver.active.utils.fill_tma_descriptor(z.data_ptr(), *rest)) for z in (x, y))
    room = ctypes.create_string_buffer(256)
    at = -(-ctypes.addressof(room) // 128) * 128
    ctypes.memmove(at, one, 128)
    move: Any = ctypes.CDLL("libcuda.so.1").cuTensorMapReplaceAddress
    if move(ctypes.c_void_p(at), ctypes.c_void_p(y.data_ptr())) or ctypes.string_at(at, 128) != other:
        return "its self-test failed: descriptors of the copy engine cannot be moved"
    return None


def _launches(module: Any) -> str | None:
    """Whether a kernel that is started from C writes where it should."""
    from ..replay import Replays
    from .packing import Form, make_call

    def ones(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return torch.ones_like(q), None  # a recording puts down a kernel for it

    device = torch.device("cuda", torch.cuda.current_device())
    q, k, v = (torch.empty(1, 5, 3, 16, device=device) for _ in range(3))
    replays = Replays([], "native self-test")
    replays(ones, (q, k, v), "form")
    replays(ones, (q, k, v), "form")
    launches = replays.latest("form")
    if launches is None:
        return "its self-test failed: a launch of Triton's could not be recorded"
    form = Form(tuple(q.shape), (q.stride(), k.stride(), v.stride()), q.dtype, device)
    call = make_call(module, launches, form, None, ())
    if call is None:
        return "its self-test failed: Triton's launcher is another one"
    asked = []

    def body(*args: Any) -> Tensor:
        asked.append(args)
        return torch.zeros_like(q)

    module.set_body(body)
    module.arm(_NUMBER, call, None)
    found = module.attend(q, k, v, torch.tensor(_NUMBER, device="cpu"), None, None, False, False)
    if module.disarm(_NUMBER, call) != 1 or asked or not bool((found == 1).all()):
        return "its self-test failed: what it launches does not arrive"
    return None
