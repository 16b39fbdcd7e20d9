"""The operator's body in C: what it launches is what Triton's launchers launch, and all else goes to Python."""

from __future__ import annotations

import importlib.resources
import threading
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel_kernels import native
from dit_accel_patches import op
from dit_accel_patches.handles import current
from tests.kernels.in_c import in_c, started
from tests.kernels.launches import REASON, agree, same_form, watched

# Poison is written by an operation of torch, which no recording lets pass.
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.no_poison]


@pytest.fixture(scope="module", params=["adaspa", "auto"])
def made(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A settled call of a layer, with the body in C."""
    import host_overhead  # in benchmarks, which tests.kernels.launches has put on the path

    with watched(), host_overhead.sparse(request.param, torch.device("cpu")) as found, in_c() as module:
        run, state = found.installation.run, found.installation._state
        yield SimpleNamespace(run=run, state=state, qkv=found.qkv, found=found, module=module)


@pytest.fixture
def armed(made: Any) -> Iterator[Any]:
    """The same with the layer's call armed; ``asked`` lists what went to the body in Python."""
    run, asked = made.run, list[Any]()
    for _ in range(2):
        run.begin_forward(run._geometry, dit_accel.StepInfo(step=3, steps=10))
        made.found.calls[0]()
    made.asked = asked

    def body(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return torch.zeros(1)

    with torch.no_grad():
        op.arm(made.state)
        assert [layer for _, layer, *_ in run._armed._now] == [0]
        made.module.set_body(body)
        yield made
    made.module.set_body(op._attend)
    run.disarm()


def call(made: Any, *qkv: Tensor, scale: float | None = None, **given: Any) -> Tensor:
    q, k, v = qkv or made.qkv
    return torch.ops.dit_accel.attend(q, k, v, current().layer, None, scale, False, False, **given)


def test_tensors_are_read_as_they_are(made: Any) -> None:
    for x in (torch.empty(2, 3), torch.empty(4, 6, dtype=torch.bfloat16)[::2, 1::2], torch.tensor(3.0)):
        sizes, strides, address, *_ = made.module.describe(x)
        assert (sizes, strides, address) == (tuple(x.shape), x.stride(), x.data_ptr())
    with pytest.raises(TypeError):
        made.module.describe(torch.nn.Parameter(torch.zeros(1)))


def test_what_is_launched_is_what_triton_launches(armed: Any) -> None:
    settled = next(iter(armed.run._settled.values()))
    program, launches = settled._launches.program, settled._launches
    known = [*armed.qkv]
    for qkv in (armed.qkv, [x + 1 for x in armed.qkv]):
        known += qkv
        with started(program.kernels) as theirs:
            assert launches.like(qkv[0], tuple(qkv)) is not None
        with started(program.kernels) as mine:
            call(armed, *qkv)
        assert len(theirs) == len(program.starters)
        wanted, found = same_form(theirs, *known), same_form(mine, *known)
        assert agree(found, wanted)
        assert agree(wanted, found)
    assert not armed.asked


def test_calls_are_counted(armed: Any) -> None:
    ledger = armed.run.ledger
    calls, hits = len(ledger.calls), ledger.cache_hits
    out = [call(armed) for _ in range(3)] + [op.attend(*armed.qkv, current().layer, None, None, False, False)]
    assert all(x.shape == armed.qkv[0].shape and x.stride() == armed.qkv[0].stride() for x in out)
    assert len({x.data_ptr() for x in out}) == 4
    armed.run.disarm()
    assert (len(ledger.calls) - calls, ledger.cache_hits - hits) == (4, 4)
    assert ledger.calls[-1].step == 3
    armed.run.disarm()
    assert len(ledger.calls) - calls == 4, "counted once"
    call(armed)
    assert len(armed.asked) == 1, "nothing is armed any more"


def test_a_status_in_the_middle_counts_them(armed: Any) -> None:
    calls = len(armed.run.ledger.calls)
    call(armed)
    with mock.patch.object(type(armed.run.ledger), "status", lambda self, *_: len(self.calls)):
        assert armed.run.status() == calls + 1


OTHERS: dict[str, Any] = {
    "layout": lambda q, k, v: torch.stack((q, k, v), 2).unbind(2),
    "one layout": lambda q, k, v: (q, k, torch.stack((q, k, v), 2).unbind(2)[2]),
    "dtype": lambda q, k, v: (q.half(), k.half(), v.half()),
    "one dtype": lambda q, k, v: (q, k, v.half()),
    "length": lambda q, k, v: tuple(x[:, :-1].contiguous() for x in (q, k, v)),
    "batch": lambda q, k, v: tuple(x.repeat(2, 1, 1, 1) for x in (q, k, v)),
    "dimensions": lambda q, k, v: (q[0], k[0], v[0]),
    "alignment": lambda q, k, v: (torch.cat((q.flatten(), q.flatten()))[1 : 1 + q.numel()].view_as(q), k, v),
    "subclass": lambda q, k, v: (torch.nn.Parameter(q, requires_grad=False), k, v),
    "one subclass": lambda q, k, v: (q, k, torch.nn.Parameter(v, requires_grad=False)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_tensors_go_to_python(armed: Any, what: str) -> None:
    qkv = OTHERS[what](*armed.qkv)
    with started(()) as launched:
        op.attend(*qkv, current().layer, None, None, False, False)
        assert not launched
        assert len(armed.asked) == 1
        call(armed)
    assert len(armed.asked) == 2, "it is not asked about again"


def test_other_arguments_go_to_python(armed: Any) -> None:
    layer, mask = current().layer, torch.ones(1, 1, 1, armed.qkv[0].shape[1], dtype=torch.bool)
    attend, qkv = armed.module.attend, armed.qkv
    with started(()) as launched:
        attend(*qkv, layer, mask, None, False, False)
        attend(*qkv, layer, None, None, True, False)
        attend(*qkv, layer, None, None, False, False, True)
        attend(*qkv, layer, None, None, False, False, spread=False)
        attend(*qkv, torch.tensor(10**6), None, None, False, False)
        attend(*qkv, torch.tensor(-1), None, None, False, False)
        attend(*qkv, torch.tensor(1, dtype=torch.int32), None, None, False, False)
        attend(*qkv, torch.tensor([1]), None, None, False, False)
        attend(*qkv, 1, None, None, False, False)
        attend()
    assert not launched
    assert len(armed.asked) == 10
    assert armed.asked[3][1] == {"spread": False}
    assert call(armed).shape == qkv[0].shape, "none of these says anything about the armed call"
    attend(*qkv, layer, None, 0.5, False, False)
    assert len(armed.asked) == 11, "another scale"


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_python(armed: Any) -> None:
    from triton import knobs

    layer = current().layer

    def arm() -> None:
        armed.module.set_body(op._attend)
        armed.run.disarm()
        op.arm(armed.state)
        armed.module.set_body(lambda *args: armed.asked.append(args) or torch.zeros(1))

    def blend(*_: Any) -> None: ...

    with Watching():
        armed.module.attend(*armed.qkv, layer, None, None, False, False)
    assert len(armed.asked) == 1
    arm()
    with torch.enable_grad():
        armed.module.attend(*armed.qkv, layer, None, None, False, False)
    assert len(armed.asked) == 2
    arm()
    with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
        armed.module.attend(*armed.qkv, layer, None, None, False, False)
    assert len(armed.asked) == 3
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        arm()
        asked = len(armed.asked)
        hook.add(blend)
        try:
            call(armed)
        finally:
            hook.remove(blend)
        assert len(armed.asked) == asked + 1
    arm()
    asked = len(armed.asked)
    armed.run.blends.append(object())
    try:
        call(armed)
    finally:
        armed.run.blends.clear()
    assert len(armed.asked) == asked + 1
    arm()
    call(armed)
    assert len(armed.asked) == asked + 1


def test_errors_of_the_body_arrive_as_they_are(armed: Any) -> None:
    class OwnError(Exception):
        pass

    def body(*_: Any) -> Any:
        raise OwnError("said in Python")

    armed.run.disarm()
    armed.module.set_body(body)
    with pytest.raises(OwnError, match="said in Python"):
        call(armed)


def test_errors_of_the_driver(armed: Any) -> None:
    """A launch that fails says so, as Triton's launchers do."""
    import ctypes

    library = ctypes.CDLL("libcuda.so.1")
    failing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)(lambda *_: 700)
    where = ctypes.c_void_p.in_dll(library, "on_launch")
    where.value = ctypes.cast(failing, ctypes.c_void_p).value
    try:
        with pytest.raises(RuntimeError, match=r"Triton Error \[CUDA\]: idle"):
            call(armed)
    finally:
        where.value = None
    assert not armed.asked


def test_another_device_goes_to_python(armed: Any) -> None:
    native.set_up(armed.module, device=lambda: 1, stream=lambda index: 0)
    try:
        call(armed)
    finally:
        native.set_up(armed.module, device=lambda: 0, stream=lambda index: 0)
    assert len(armed.asked) == 1


def test_threads_and_disarming(armed: Any) -> None:
    """Calls in several threads while others arm and disarm: each is made in C or asked of Python, none is lost."""
    wanted, failed = 200, list[BaseException]()
    ledger = armed.run.ledger
    calls = len(ledger.calls)

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(wanted):
                    armed.module.attend(*armed.qkv, armed.layer, None, None, False, False)
        except BaseException as error:
            failed.append(error)

    armed.layer = current().layer
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        armed.run.disarm()
        op.arm(armed.state)
    for thread in threads:
        thread.join()
    armed.run.disarm()
    assert not failed
    assert len(ledger.calls) - calls + len(armed.asked) == 3 * wanted
    armed.run.ledger.calls[calls:] = []


def test_bad_arrays_are_refused(made: Any) -> None:
    def words(*values: int) -> bytes:
        return array("q", values).tobytes()

    form, launch = bytes(20 * 8), words(1, 1, 1, 1, 128, 0, 0, 0, 1, 0, 1)
    good = (form, launch, words(0), words(0, 1, 0, 0), b"", bytes(8), None, ())
    made.module.Call(*good)
    bad: dict[int, Any] = {0: bytes(8), 1: words(1, 1), 2: words(8), 3: words(0, 9, 0, 0), 4: words(1, 5, *[0] * 8)}
    bad[5] = bytes(1 << 20)
    for place, value in bad.items():
        with pytest.raises(ValueError, match=r"bytes|fit"):
            made.module.Call(*good[:place], value, *good[place + 1 :])
    with pytest.raises(TypeError):
        made.module.arm(1, None, None)
    with pytest.raises(ValueError, match="number"):
        made.module.arm(-1, made.module.Call(*good), None)


def test_the_source_is_in_the_package() -> None:
    assert importlib.resources.files("dit_accel_kernels.native").joinpath("again.c").is_file()


def test_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GPU" in str(native._why_not_here())
    fresh = native._found
    assert fresh().module is None
    monkeypatch.setattr(native, "_why_not_here", lambda: None)
    monkeypatch.setattr(native, "build", mock.Mock(side_effect=RuntimeError("Failed to find C compiler.\nmore")))
    assert fresh() == native.Native(None, "RuntimeError: Failed to find C compiler.")
    monkeypatch.undo()
