"""Join the rows of docs/methods_rows/ into the table of docs/methods.md.

python scripts/methods_page.py            # writes the page
python scripts/methods_page.py --check    # exit code 1 if the page is not what the rows say
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS, PAGE = ROOT / "docs/methods_rows", ROOT / "docs/methods.md"
BEGIN, END = "<!-- rows: scripts/methods_page.py -->", "<!-- end of rows -->"
HEAD = (
    "| name | paper | order | score | selection | remainder | plan made | chosen where the paper is silent |\n"
    + "|---" * 8
    + "|"
)
FAMILIES = {
    "Ours": ("auto", "union", "dense"),
    "Static geometry": (
        *("na", "dina", "gna", "sta", "sta_search", "freeswim", "radial", "streaming", "power", "halo", "svg1"),
        "vertical_slash",
    ),
    "Scored blocks": (
        *("adaspa", "paro", "paro_int8", "paro_int4", "xattn", "sparge", "sparge_topk", "asa", "subblock", "draft"),
        *("jenga", "proxy", "sale", "anchor", "bra", "dhsa", "vmoba", "lite"),
    ),
    "Content order": ("pbs", "svg2", "routing"),
    "Compensation": ("psa", "llsa_lite", "sol", "pisa", "rectified", "agent", "residual"),
    "Learned": ("seer",),
    "Reuse": ("delta", "tidal", "recycled"),
}


def table() -> str:
    """One table a family."""
    parts = []
    for family, names in FAMILIES.items():
        rows = [(ROWS / f"{name}.md").read_text(encoding="utf-8").strip() for name in names]
        parts.append("\n".join([f"### {family}", "", HEAD, *rows]))
    known = {name for names in FAMILIES.values() for name in names}
    unknown = {path.stem for path in ROWS.glob("*.md")} - known
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: no family in scripts/methods_page.py")
    return "\n\n".join(parts)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
    if "--check" in sys.argv and wanted != text:
        raise SystemExit("docs/methods.md is not what docs/methods_rows/ say; run python scripts/methods_page.py")
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
