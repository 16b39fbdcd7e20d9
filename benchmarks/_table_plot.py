"""PSNR against measured work: a panel for each family of methods, all others in grey behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from _table_rows import Row, at

__all__ = ["plot"]

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

_OURS, _OTHERS = ("auto", "union"), "other"
_MARKS = "os^DvP*Xph<>"


def _families(methods: set[str]) -> dict[str, list[str]]:
    from methods_page import FAMILIES

    known = {name: family for family, names in FAMILIES.items() for name in names}
    found: dict[str, list[str]] = {}
    for method in sorted(methods - set(_OURS)):
        family = known.get(method, _OTHERS)
        family = "Content order, reuse" if family in ("Content order", "Reuse") else family
        found.setdefault(family, []).append(method)
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Write the picture as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    good = [r for r in rows if r["target"] is not None and "error" not in r]
    lines = {
        m: sorted((r["density"], r["psnr"]) for r in good if r["method"] == m) for m in {r["method"] for r in good}
    }
    families = _families(set(lines)) or {"Ours": []}
    wide = 2 if len(families) > 1 else 1
    figure, grid = plt.subplots(
        -(-len(families) // wide), wide, figsize=(6.2 * wide, 4.4 * -(-len(families) // wide)), sharex=True, sharey=True
    )
    panels = list(getattr(grid, "flat", [grid]))
    floor = [r["psnr"] for r in at(rows, None)]
    for axes, (family, methods) in zip(panels, families.items()):
        _panel(axes, family, methods, lines, floor[0] if floor else None)
    for axes in panels[len(families) :]:
        axes.set_visible(False)
    figure.supxlabel("work over dense, warm-up and planning included", fontsize=10)
    figure.supylabel("PSNR against dense, dB", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _panel(
    axes: Any, family: str, methods: list[str], lines: dict[str, list[tuple[float, float]]], floor: float | None
) -> None:
    for line in lines.values():
        axes.plot(*zip(*line), color="0.86", linewidth=0.8, zorder=1)
    last = {m: lines[m][-1][1] for m in methods}
    colours = _colours(len(methods))
    for i, method in enumerate(sorted(methods, key=lambda m: -last[m])):
        mark = _MARKS[i % len(_MARKS)]
        axes.plot(*zip(*lines[method]), marker=mark, markersize=4.5, linewidth=1.3, color=colours[i], label=method)
    for ours, style in zip(_OURS, ("-", "--")):
        if ours in lines:
            axes.plot(*zip(*lines[ours]), style, marker="o", markersize=4.5, linewidth=2.2, color="black", label=ours)
    if floor is not None:
        axes.axhline(floor, color="0.4", linestyle=":", linewidth=1, label="another seed")
    axes.set_title(family, fontsize=10)
    axes.legend(fontsize=7, ncols=2, loc="upper left", framealpha=0.85)
    axes.grid(alpha=0.25)


def _colours(count: int) -> list[Any]:
    from matplotlib import pyplot as plt

    return [plt.get_cmap("turbo")((i + 0.5) / max(count, 1)) for i in range(count)]
