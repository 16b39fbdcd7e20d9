"""A capture as one page to look at and click through."""

from __future__ import annotations

from pathlib import Path

from dit_accel_eval.files import write_text
from dit_accel_eval.inspect.model import Capture
from dit_accel_eval.inspect.pack import pack
from dit_accel_eval.report.page import render

__all__ = ["write_viewer"]

_STYLES = ("report/static/base.css", "inspect/static/viewer.css")
_SCRIPTS = tuple(
    ["report/static/common.js", *(f"inspect/static/{name}.js" for name in ("unpack", "maps", "tokens", "viewer"))]
)


def write_viewer(capture: Capture, path: str | Path, *, max_bytes: int = 15_000_000) -> Path:
    """Write the interactive page of a capture; it needs no network and loads nothing.

    Args:
        capture: what to show.
        path: the file, ``.html``.
        max_bytes: size that is not exceeded; fewer of the sampled tokens can be clicked until it fits, and the page says
            so.

    Returns:
        The file.

    Raises:
        ValueError: the capture is empty, or its maps alone are larger than ``max_bytes``.
        OSError: the file cannot be written.
    """
    path, every = Path(path), 1
    while True:
        packed = pack(capture, every)
        page = render(
            "inspect/templates/viewer.html.j2",
            styles=_STYLES,
            scripts=_SCRIPTS,
            capture=capture,
            data=packed.data,
            blobs=packed.blobs,
            shown=packed.tokens,
        )
        size = len(page.encode())
        if size <= max_bytes:
            break
        if packed.tokens == 1:
            raise ValueError(
                f"the page would have {size / 1e6:.1f} MB, more than max_bytes={max_bytes / 1e6:.1f} MB; capture fewer "
                "layers, heads, steps or methods"
            )
        every *= 2
    write_text(path, page)
    return path
