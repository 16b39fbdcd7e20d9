"""Write ``docs/models.md`` from the adapters: ``python scripts/models_page.py``, or ``--check`` to compare only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dit_accel.adapter import Adapter
from dit_accel.registry import adapters

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/models.md"

HEAD = """# Models

<!-- Written by scripts/models_page.py from the adapters; edit those. -->

Every class below runs accelerated in the tests, from tiny random weights: equal to dense attention where everything is
kept, sparse where not, bit-equal again after `disable`. Its adapter says where the visual tokens stand among the others,
and the tests change one pixel of each to see that it is the right place.

The order is that of the tokens in one attention call. Tokens that are not of the grid, such as text and reference
pictures, are exact: every query sees them, and they see everything. Token counts follow from the size, the compression
of the autoencoder and the patches. `dit-accel models` and `dit_accel.supported_models()` list the same, with what
plug-ins add. [Adding one](add_a_model.md) takes one file.
"""

TAIL = """## Masks and lengths

- Padding of prompts comes as a mask of valid keys, and sparse attention honours it, each sample of a batch its own.
- HunyuanVideo-1.5 builds three boolean masks of S² elements in every layer, 12 GB each at 720p. While it is accelerated
  none of them is built, on dense steps neither.
- Mochi calls attention once a sample, with the text cut to its length: each sample has plans of its own.
- Keys that have no query, as the text of PRX, Nucleus-Image and Cosmos 3, are exact and joined by their log-sum-exp.
- A mask that is none of these, causal attention, and blocks whose processor has weights of its own (IP-Adapters) stay
  dense. The reason is counted: see `dit_accel.status(pipe)`.

## What composes

An acceleration lives in the attention processors of one pipeline object: no class is changed. Files of diffusers whose
processors call attention by a name of their own have that name exchanged for as long as a model of theirs is
accelerated. The design asks that it composes with `set_attention_backend`, LoRA, offload, `torch.compile` and caching
hooks, in any order of switching on and off; the tests say which combinations are held today.

## Small sequences

Below `min_tokens` (an argument of `enable`) attention stays dense, since planning would cost more than it saves. The
reason appears in `status`.
"""


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _tokens(adapter: Adapter) -> str:
    lines = []
    for size in getattr(adapter, "sizes", ()):
        extra = f" + {_number(size.extra)}" if size.extra else ""
        lines.append(f"{size.name}: {_number(size.tokens)}{extra}")
    return "<br>".join(lines)


def _row(adapter: Adapter) -> str:
    classes = "<br>".join(f"`{name}`" for name in adapter.models)
    columns = ", ".join(map(str, getattr(adapter, "head_dim", ())))
    order = getattr(adapter, "layout", "").replace("|", "·")
    cells = (adapter.note, classes, order, columns, _tokens(adapter), getattr(adapter, "dense", ""))
    return "| " + " | ".join(cells) + " |"


def _table(task: str, found: list[Adapter]) -> str:
    lines = [f"## {task}", ""]
    lines.append("| models | transformer class | order | head size | tokens: visual + others at most | always dense |")
    lines.append("|---|---|---|---|---|---|")
    return "\n".join([*lines, *map(_row, found)]) + "\n"


def _generic(adapter: Adapter) -> str:
    refused: dict[str, str] = dict(getattr(adapter, "refused", {}))
    lines = [
        "## Any other transformer of diffusers",
        "",
        "A class that is not listed is served on one axis: the longest self-attention of a forward call is taken for the",
        "sequence. Methods that score tokens in their order apply; those that need frames, rows and columns stay dense and",
        "say so, and text is not told apart. These raise on `enable`, with the reason:",
        "",
        "| transformer class | reason |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| `{name}` | {reason} |" for name, reason in refused.items())]) + "\n"


def page() -> str:
    """The page as text."""
    found = [adapter for adapter in adapters().values() if adapter.name != "generic"]
    parts = [HEAD]
    parts += [
        _table(title, [a for a in found if a.task == task]) for title, task in (("Video", "video"), ("Images", "image"))
    ]
    parts += [_generic(adapters()["generic"]), TAIL]
    return "\n".join(parts)


def main() -> int:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    text = page()
    if options.check:
        current = PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE} is {'up to date' if current else 'old: run python scripts/models_page.py'}")
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
