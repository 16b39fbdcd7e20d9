"""Tables, JSON, picture and page of the records of a folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from _table_plot import plot
from _table_queue import read_samples
from _table_rows import COLUMNS, FLOOR, Row, at, over, rank_correlation, summary, targets

from dit_accel_eval.files import write_json, write_text

__all__ = ["join"]

PICTURE = "methods_pareto.svg"
_MARK = "†"


def join(folder: Path, page: Path | None = None) -> None:
    """Tables, JSON and plot of every record in a folder.

    Args:
        folder: with ``samples_*.jsonl``.
        page: a page of the documentation whose generated parts are renewed, with its picture in ``assets`` beside it.
    """
    records = read_samples(folder)
    if not records:
        raise SystemExit(f"{folder} holds no samples_*.jsonl with records")
    rows = summary(records)
    settings = json.loads((folder / "settings.json").read_text()) if (folder / "settings.json").is_file() else {}
    write_json(folder / "methods_table.json", {**settings, "rows": rows})
    write_text(folder / "methods_table.md", tables(rows))
    plot(rows, folder / "pareto.svg")
    if page is not None:
        text = page.read_text(encoding="utf-8")
        for name, part in (("overview", overview(rows)), ("tables", tables(rows)), ("ranks", ranks(rows))):
            text = renewed(text, name, part)
        if "<!-- reasons -->" in text:
            text = renewed(text, "reasons", reasons(rows))
        write_text(page, text)
        shutil.copyfile(folder / "pareto.svg", page.parent / "assets" / picture_of(page))


def picture_of(page: Path) -> str:
    """Name of the picture of a page: ``methods_table_image.md`` has ``methods_pareto_image.svg``."""
    return (
        PICTURE.replace(".", page.stem.removeprefix("methods_table") + ".") if "methods_table" in page.stem else PICTURE
    )


def renewed(text: str, name: str, part: str) -> str:
    """A page with the part between ``<!-- name -->`` and ``<!-- end of name -->`` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the page must have {begin!r} and {end!r} once each")
    return re.sub(
        re.escape(begin) + ".*" + re.escape(end), lambda _: f"{begin}\n\n{part}\n{end}", text, flags=re.DOTALL
    )


def overview(rows: list[Row]) -> str:
    """PSNR of each method at each target, and its LPIPS."""
    wanted = targets(rows)
    found = {(r["method"], r["target"]): r for r in rows}
    methods = list(dict.fromkeys(r["method"] for target in (0.3, *wanted) for r in at(rows, target)))
    lines = ["| method | " + " | ".join(f"{t:g}" for t in wanted) + " |", "|---" * (len(wanted) + 1) + "|"]
    for method in methods:
        cells = []
        for target in wanted:
            row = found.get((method, target))
            if row is None:
                cells.append("not run")
            elif "error" in row:
                cells.append("–")
            else:
                mark = f" {_MARK}" if over(row) else ""
                cells.append(f"{row['psnr']:.2f} ({row['lpips_alex']:.3f}){mark}")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables(rows: list[Row]) -> str:
    """Everything that was measured, a table for each target."""
    known = {r["method"] for r in rows if r["target"] is not None}
    columns = {k: v for k, v in COLUMNS.items() if any(row.get(k) is not None for row in rows)}
    parts = [_table("Floor", at(rows, None), columns)]
    for target in targets(rows):
        here = at(rows, target)
        part = _table(f"Work {target:g} of dense", here, columns)
        refused = sorted(r["method"] for r in rows if r["target"] == target and "error" in r)
        missing = sorted(known - {r["method"] for r in here} - set(refused))
        for told, names in (("Cannot reach it", refused), ("Not run", missing)):
            if names:
                part += f"\n\n{told}: " + ", ".join(f"`{name}`" for name in names) + "."
        parts.append(part)
    return "\n\n".join(parts) + "\n"


def reasons(rows: list[Row]) -> str:
    """Why methods have no numbers, in the engine's words."""
    told: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            told.setdefault((row["method"], row["error"]), []).append(f"{row['target']:g}")
    lines = ["| method | work | reason |", "|---|---|---|"]
    lines += [f"| `{name}` | {', '.join(works)} | {error} |" for (name, error), works in sorted(told.items())]
    return "\n".join(lines) + "\n"


def _table(heading: str, rows: list[Row], columns: dict[str, tuple[str, str]]) -> str:
    head = ["method", *(label for label, _ in columns.values())]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [format(row[k], spec) if row.get(k) is not None else "" for k, (_, spec) in columns.items()]
        if over(row):
            cells[0] += f" {_MARK}"
        name = row["method"] if row["method"] == FLOOR else f"`{row['method']}`"
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join([f"### {heading}", "", *lines])


def ranks(rows: list[Row]) -> str:
    """How well each number ranks the methods as PSNR does."""
    labels = {
        "ssim": "SSIM",
        "lpips_alex": "LPIPS",
        "attention_rel_l1": "attention rel-L1",
        "recalled_mass": "recalled mass",
    }
    labels = {key: label for key, label in labels.items() if any(row.get(key) is not None for row in rows)}
    lines = ["| work | methods | " + " | ".join(labels.values()) + " |", "|---" * (len(labels) + 2) + "|"]
    for target in targets(rows):
        here = at(rows, target)
        found = (rank_correlation(here, "psnr", key) for key in labels)
        cells = ["" if value is None else f"{value:+.2f}" for value in found]
        lines.append(f"| {target:g} | {len(here)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
