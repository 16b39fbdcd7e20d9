"""Write ``docs/compatibility.md`` and the table in ``README.md`` from the tests in ``tests/combinations``.

A test stands for a row if it is marked ``@pytest.mark.combination(group, name, result, note)``. Nothing is imported, so the
page does not depend on what happens to be installed::

    python scripts/compatibility_page.py           # write
    python scripts/compatibility_page.py --check   # compare only
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dit_accel._files import write_whole

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests/combinations"
PAGE = ROOT / "docs/compatibility.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- combinations: written by scripts/compatibility_page.py -->", "<!-- end of combinations -->"

#: Groups in the order of the page.
GROUPS = (
    "torch.compile",
    "Caches",
    "Weights",
    "Placement",
    "Attention backends",
    "Switching",
    "Copies and files",
    "Runs",
    "Threads",
)
RESULTS = ("works", "stays dense", "refused", "not run")

HEAD = """# Combinations

<!-- Written by scripts/compatibility_page.py from the marks in tests/combinations; edit those. -->

What dit_accel was run together with, on tiny random pipelines (Wan, FLUX, CogVideoX, DiT) with diffusers {newest}. Every
row is a test. *Works* means: attention was sparse where the schedule says so, the output equals that of the same pipeline
without the neighbour or, with everything kept, that of the neighbour without dit_accel, and after `disable` every object is
the one that was there before. *Stays dense* means that the calls in question run the model's own attention and
`dit_accel.status(pipe)` gives the reason. *Refused* is an error that says what to do. *Not run*: the test is there, and the
GPU that it needs was not.
"""

TAIL = """## What the host pays

Where a layer is sparse, the host looks up its plan and launches kernels. The first call of a layout takes all of the
kernels' Python; later ones make its launches again with other addresses. Where the schedule has nothing new to say, a piece
of C does that, and none of our Python runs, in eager mode as in a compiled graph ([design](design.md#launches-made-again)).
On the host of an H200 a call of `auto` takes 30 microseconds instead of 741, its 7 launches, torch's allocations
(5) and the dispatch of diffusers (2) included; one by one through Triton's launchers these launches take 32.
`adaspa`, one launch, takes 10 instead of 216. What can change between steps is asked when a forward call of the
transformer begins, 1.7 microseconds a layer (`benchmarks/host_overhead.py`, which needs no GPU; record:
`benchmarks/results/host_overhead.json`).

Our Python still runs in planning steps and in the first call of a new plan; with a mask of keys, where torch computes
what follows from it; for heads that are spread over GPUs, for attention called with heads before tokens (CogVideoX),
with `cross_attention="cached"`, with compensations that torch computes (`pisa`, `rectified` and the like: every call
goes the long way), and where the C cannot be built or fails its test, which `dit-accel env` says. A repeated call
then takes 46 (`auto`) and 18 (`adaspa`) microseconds.

A compiled graph holds one operator for each attention call: the processor and the dispatch are traced away, and the
body of the operator stays. In a compiled region with nothing else, beyond its launches and an operator whose Python
only allocates its output, it took 32 microseconds (`auto`) and 28 (`adaspa`) with its body in Python. In C it took -1
and 5 in the same run, with the processor's caches full of other things; what is left is C and torch's memory for what
stands between kernels. The host runs ahead of the GPU ([whole steps](e2e.md#what-the-host-does-meanwhile)).
`mode="reduce-overhead"` leaves the operator between its CUDA graphs, since what it does differs from step to step. A
CUDA graph that you capture and replay yourself runs no Python of ours at all, and so repeats the plan of the step
that was captured.

## More about threads

A run is one denoising loop. Loops may follow each other in any threads, and one loop may change threads between its steps.
Two loops at once in one transformer would mix their steps, so the second gets a `RuntimeError`, recognised by the stack of
the other thread: it is inside the transformer, or in the `__call__` of a pipeline that holds it. A loop of your own making
that is between two calls is not recognised; guard it by a lock, or give each thread a transformer.

## Versions

diffusers {oldest} is the oldest supported; tests for features that it does not have are skipped there. With torchao 0.18
installed diffusers {oldest} cannot be imported at all, with or without dit_accel; with torchao 0.14.1 it can.
"""


@dataclass(frozen=True)
class Row:
    """One combination.

    Attributes:
        group: section of the page.
        name: what is combined, in Markdown.
        result: one of :data:`RESULTS`.
        note: what there is to say besides.
        test: ``file::function``.
        gpu: whether the test needs a GPU.
    """

    group: str
    name: str
    result: str
    note: str
    test: str
    gpu: bool


def _mark(decorator: ast.expr) -> tuple[str, list[str]] | None:
    """Name and arguments of a ``pytest.mark``, ``None`` for any other decorator."""
    call = decorator if isinstance(decorator, ast.Call) else None
    target = call.func if call is not None else decorator
    if not isinstance(target, ast.Attribute) or ast.unparse(target.value) != "pytest.mark":
        return None
    if target.attr != "combination" or call is None:
        return target.attr, []
    return target.attr, [ast.literal_eval(argument) for argument in call.args]


def _rows_of(path: Path) -> Iterator[Row]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = dict(mark for mark in map(_mark, node.decorator_list) if mark is not None)
        if "combination" not in marks:
            continue
        group, name, result, *note = marks["combination"]
        where = f"{path.name}::{node.name}"
        if group not in GROUPS:
            raise ValueError(f"{where}: group must be one of {', '.join(GROUPS)}, got {group!r}")
        if result not in RESULTS:
            raise ValueError(f"{where}: result must be one of {', '.join(RESULTS)}, got {result!r}")
        yield Row(group, name, result, note[0] if note else "", where, "gpu" in marks)


def rows(tests: Path = TESTS) -> list[Row]:
    """Every combination that a test stands for, in the order of the files.

    Raises:
        ValueError: a mark with an unknown group or result, or two rows of one name.
    """
    found = [row for path in sorted(tests.glob("test_*.py")) for row in _rows_of(path)]
    names = [row.name for row in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tests stand for the same combination: {', '.join(twice)}")
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _section(group: str, found: list[Row]) -> str:
    lines = [f"## {group}", "", "| together with | | remarks | test |", "|---|---|---|---|"]
    for row in found:
        note = ", ".join(filter(None, [row.note, "GPU" if row.gpu else ""]))
        lines.append(f"| {_cell(row.name)} | {row.result} | {_cell(note)} | `{row.test}` |")
    return "\n".join(lines) + "\n"


def _versions() -> dict[str, str]:
    """Versions of diffusers, read where they are decided."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = project.split('"diffusers>=')[1].split('"')[0]
    return {"oldest": oldest, "newest": "0.42.1"}


def page(found: list[Row]) -> str:
    """``docs/compatibility.md`` as text."""
    parts = [HEAD.format(**_versions())]
    parts += [_section(group, of) for group in GROUPS if (of := [row for row in found if row.group == group])]
    return "\n".join([*parts, TAIL.format(**_versions())])


def table(found: list[Row]) -> str:
    """The table of the README: a line a group."""
    lines = ["| together with | works | stays dense, or is refused, and says why |", "|---|---|---|"]
    for group in GROUPS:
        of = [row for row in found if row.group == group]
        works = " · ".join(_cell(row.name) for row in of if row.result == "works")
        others = " · ".join(_cell(row.name) for row in of if row.result in ("stays dense", "refused"))
        lines.append(f"| {group} | {works} | {others} |")
    return "\n".join(lines)


def readme(text: str, found: list[Row]) -> str:
    """The README with the table between its two marks exchanged.

    Raises:
        ValueError: if the marks are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{README} must have the lines {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write both files, or say whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    found = rows()
    old = False
    for path, text in ((PAGE, page(found)), (README, readme(README.read_text(encoding="utf-8"), found))):
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        old = True
        if options.check:
            print(f"{path} is old: run python scripts/compatibility_page.py")
        else:
            write_whole(path, text.encode("utf-8"))
    return 1 if old and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
