"""Rows of the table of methods: means over the prompts of what the workers wrote."""

from __future__ import annotations

from typing import Any

__all__ = ["COLUMNS", "FLOOR", "Row", "at", "over", "rank_correlation", "summary", "targets"]

Row = dict[str, Any]

FLOOR = "another seed"
#: Label and format of each number.
COLUMNS = {
    "density": ("density", ".3f"),
    "psnr": ("PSNR, dB", ".2f"),
    "worst": ("worst", ".1f"),
    "ssim": ("SSIM", ".4f"),
    "lpips_alex": ("LPIPS", ".4f"),
    "flicker_difference": ("flicker difference", "+.5f"),
    "attention_rel_l1": ("attention rel-L1", ".3f"),
    "recalled_mass": ("recalled mass", ".3f"),
    "plan_work": ("plan work", ".3f"),
    "plan_ms": ("plan ms", ".0f"),
    "samples": ("samples", "d"),
}
_NOTABLY = 1.05  # work over what was asked for from which a row is marked


def _mean(records: list[Row], key: str) -> float | None:
    values = [float(r[key]) for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def summary(records: list[Row]) -> list[Row]:
    """One row for each method and target, the best first."""
    rows = []
    for name in dict.fromkeys(r["name"] for r in records):
        found = [r for r in records if r["name"] == name]
        good = [r for r in found if "error" not in r]
        row: Row = {"name": name, "method": found[0]["method"], "target": found[0]["target"]}
        if good:
            row |= {key: _mean(good, key) for key in COLUMNS if key not in ("samples", "worst")}
            row |= {"samples": len(good), "worst": min(r["psnr"] for r in good), "warmup": _mean(good, "warmup")}
        else:
            row["error"] = found[0]["error"]
        rows.append(row)
    return sorted(rows, key=lambda r: (-(r["target"] or 2.0), -(r.get("psnr") or -1.0), r["method"]))


def targets(rows: list[Row]) -> list[float]:
    """Asked work, falling."""
    return sorted({r["target"] for r in rows if r["target"] is not None}, reverse=True)


def at(rows: list[Row], target: float | None) -> list[Row]:
    """Rows with numbers at a target."""
    return [r for r in rows if r["target"] == target and "error" not in r]


def over(row: Row) -> bool:
    """Whether a row did notably more work than was asked for."""
    return row["target"] is not None and row["density"] > _NOTABLY * row["target"]


def rank_correlation(rows: list[Row], a: str, b: str) -> float | None:
    """Spearman's rank correlation of two columns, ``None`` for fewer than three rows."""
    pairs = [(r[a], r[b]) for r in rows if r.get(a) is not None and r.get(b) is not None]
    if len(pairs) < 3:
        return None
    ranks = []
    for values in zip(*pairs):
        order = sorted(range(len(values)), key=values.__getitem__)
        ranks.append({index: place for place, index in enumerate(order)})
    count = len(pairs)
    total = sum((ranks[0][i] - ranks[1][i]) ** 2 for i in range(count))
    return 1 - 6 * total / (count * (count**2 - 1))
