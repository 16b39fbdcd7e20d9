"""Two adjustments of the documentation build."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>~?")


def on_config(config: Any) -> Any:
    """Leave out pages that are made elsewhere (results, model pages) and are not there yet."""
    docs = Path(config["docs_dir"])
    config["nav"] = [
        entry
        for entry in config["nav"]
        if not all(isinstance(page, str) and not (docs / page).exists() for page in entry.values())
    ]
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Show Sphinx roles in docstrings as the code that they hold."""
    return _ROLE.sub("<code>", html)
