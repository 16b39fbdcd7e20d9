"""Imports point downwards: kernels, core, patches, eval. The layers and what each may import are in docs/design.md."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("dit_accel_kernels", "dit_accel", "dit_accel_patches", "dit_accel_eval")

NUMERIC = {"torch", "numpy", "packaging", "safetensors"}
DIFFUSERS = {"diffusers", "transformers", "accelerate", "PIL"}
COMFY = {"comfy", "comfy_api", "folder_paths", "nodes"}
METRICS = {"torchmetrics", "cv2", "scipy", "matplotlib", "imageio", "imageio_ffmpeg", "PIL"}


@dataclass(frozen=True)
class Layer:
    """One package, where it lies, and what it may import."""

    package: str
    folder: Path
    anywhere: frozenset[str]
    lazily: frozenset[str] = frozenset()  # inside functions only


LAYERS = (
    Layer(
        "dit_accel_kernels",
        ROOT / "kernels/dit_accel_kernels",
        frozenset({"torch", "triton", "numpy", "packaging"}),
        frozenset({"flash_attn", "natten", "xformers"}),
    ),
    Layer(
        "dit_accel",
        ROOT / "dit_accel",
        frozenset({"dit_accel_kernels", "typer", "click", "rich"} | NUMERIC),
        frozenset({"huggingface_hub"}),
    ),
    Layer(
        "dit_accel_patches",
        ROOT / "patches/dit_accel_patches",
        frozenset({"dit_accel_kernels", "dit_accel"} | NUMERIC | DIFFUSERS),
        frozenset(COMFY | {"peft", "huggingface_hub"}),
    ),
    Layer(
        "dit_accel_eval",
        ROOT / "eval/dit_accel_eval",
        frozenset(
            {"dit_accel_kernels", "dit_accel", "dit_accel_patches", "rich", "typer"} | NUMERIC | DIFFUSERS | METRICS
        ),
        frozenset({"triton", "jinja2", "pynvml", "huggingface_hub"}),
    ),
)

# The command line and the demo stand above every layer, but only inside functions: importing them stays cheap.
UPPER = frozenset({"dit_accel_patches", "dit_accel_eval"} | DIFFUSERS | METRICS | {"triton", "xformers"})


def _is_entry_point(path: Path) -> bool:
    relative = path.relative_to(ROOT)
    entries = (Path("dit_accel/cli.py"), Path("dit_accel/simulator/picture.py"))
    return relative in entries or Path("dit_accel/demo") in relative.parents


def _is_type_checking(node: ast.If) -> bool:
    test = node.test
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _imports(node: ast.AST, package: tuple[str, ...], inside: bool = False) -> Iterator[tuple[str, bool, int]]:
    """Top-level name, whether it is imported inside a function, and line of each import below ``node``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], inside, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            if child.level > len(package):
                yield f"<{'.' * child.level} leaves the package>", inside, child.lineno
            else:
                yield (package[0] if child.level else (child.module or "").split(".")[0]), inside, child.lineno
        elif isinstance(child, ast.If) and _is_type_checking(child):
            # Types of optional libraries may be named; those of upper layers may not.
            yield from (found for found in _imports(child, package, True) if found[0] in OURS)
            for other in child.orelse:
                yield from _imports(other, package, inside)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, package, inside or function)


def violations(path: Path, layer: Layer) -> list[str]:
    """What ``path`` imports and its layer may not, as ``file:line name``."""
    package = (layer.package, *path.parent.relative_to(layer.folder).parts)
    found = []
    for name, inside, line in _imports(ast.parse(path.read_text(encoding="utf-8")), package):
        allowed = {layer.package, "__future__"} | sys.stdlib_module_names | layer.anywhere
        if inside:
            allowed |= layer.lazily | (UPPER if _is_entry_point(path) else frozenset())
        if name not in allowed:
            where = "" if inside else " at module level"
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}{where}")
    return found


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.package)
def test_imports_point_downwards(layer: Layer) -> None:
    files = sorted(layer.folder.rglob("*.py"))
    assert files, f"{layer.folder} holds no module"
    found = [line for path in files for line in violations(path, layer)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.package)
def test_triton_stays_in_modules_that_need_it(layer: Layer) -> None:
    """``triton`` is optional: only modules that hold kernels import it at module level, never a package root."""
    for path in layer.folder.rglob("__init__.py"):
        if path.parent.name in ("triton", "hopper"):
            continue
        names = {name for name, inside, _ in _imports(ast.parse(path.read_text()), (layer.package,) * 9) if not inside}
        assert "triton" not in names, f"{path.relative_to(ROOT)} imports triton at module level"


@pytest.mark.parametrize("folder", ["kernels", "patches", "eval"])  # the root's is ComfyUI's shim
def test_source_roots_are_no_packages(folder: str) -> None:
    """A package called ``kernels`` would hide Hugging Face's, which diffusers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.package)
def test_packages_are_typed(layer: Layer) -> None:
    assert (layer.folder / "__init__.py").is_file()
    assert (layer.folder / "py.typed").is_file()


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("dit_accel/x.py", "import diffusers", "imports diffusers at module level"),
        ("dit_accel/x.py", "def f():\n    from dit_accel_patches import wan", "imports dit_accel_patches"),
        ("dit_accel/demo/x.py", "import dit_accel_patches", "imports dit_accel_patches at module level"),
        ("dit_accel/demo/x.py", "def f():\n    import dit_accel_patches", None),
        ("dit_accel/x.py", "from ..patches import y", "leaves the package"),
        ("dit_accel/x.py", "from . import mask", None),
        ("dit_accel/x.py", "try:\n    import cv2\nexcept ImportError:\n    cv2 = None", "imports cv2 at module level"),
    ],
)
def test_the_test_sees(file: str, source: str, complaint: str | None, tmp_path: Path, monkeypatch) -> None:
    """The check finds what it should, in files made for it."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    layer = Layer("dit_accel", tmp_path / "dit_accel", LAYERS[1].anywhere, LAYERS[1].lazily)
    found = violations(path, layer)
    assert [complaint in line for line in found] == [True] if complaint else not found
