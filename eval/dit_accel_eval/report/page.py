"""Self-contained HTML: templates and scripts of this package in one file that loads nothing and runs no other script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

__all__ = ["asset", "render"]

_PACKAGE = "dit_accel_eval"


def asset(path: str) -> str:
    """Text of a file of this package, by its path inside ``dit_accel_eval``."""
    return resources.files(_PACKAGE).joinpath(path).read_text(encoding="utf-8")


def _dumps(value: Any, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@lru_cache(maxsize=1)
def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(f"reports need jinja2: pip install 'dit-accel[eval]' ({error})") from error
    environment = Environment(
        loader=PackageLoader(_PACKAGE, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # With this, `tojson` escapes <, >, & and ' itself, so that no text can end a script element.
    environment.policies["json.dumps_function"] = _dumps
    environment.policies["json.dumps_kwargs"] = {}
    return environment


def _script_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def render(template: str, *, styles: Sequence[str], scripts: Sequence[str], **values: Any) -> str:
    """Render a page.

    The page's policy lets no request leave it and no script run but ours, known by its hash, so that text that slipped
    through the escaping still could not act.

    Args:
        template: path of the template inside ``dit_accel_eval``.
        styles: paths of style sheets, joined in this order.
        scripts: paths of scripts, joined in this order.
        **values: for the template.

    Raises:
        ValueError: a number that JSON does not have.
        ImportError: jinja2 is missing.
    """
    script = "\n".join(asset(path) for path in scripts)
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {_script_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page: Mapping[str, Any] = {"style": "\n".join(asset(path) for path in styles), "script": script, "policy": policy}
    return str(_environment().get_template(template).render(page=page, **values))
