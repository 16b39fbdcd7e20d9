"""The table of methods: rows are taken once, a run goes on where the last stopped, pages are made of what is there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from _table_pages import join, overview, renewed, tables  # noqa: E402
from _table_queue import RowQueue, read_samples  # noqa: E402
from _table_rows import FLOOR, rank_correlation, summary  # noqa: E402

from dit_accel_eval.files import append_record  # noqa: E402


def _record(method: str, target: float | None, prompt: str, psnr: float, **more: Any) -> dict[str, Any]:
    name = method if target is None else f"{method} {target:g}"
    base = {"name": name, "method": method, "target": target, "prompt": prompt, "psnr": psnr, "density": target or 1.0}
    return {**base, "ssim": psnr / 40, "lpips_alex": 1 / psnr, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    first, second = tmp_path / "samples_0.jsonl", tmp_path / "samples_1.jsonl"
    for prompt, psnr in (("cat", 30.0), ("dog", 20.0)):
        append_record(first, _record(FLOOR, None, prompt, psnr - 10))
        append_record(first, _record("auto", 0.5, prompt, psnr, attention_rel_l1=0.1, recalled_mass=0.8))
        append_record(
            second, _record("sol", 0.5, prompt, psnr - 1, density=0.6, attention_rel_l1=0.2, recalled_mass=0.7)
        )
        append_record(second, _record("auto", 0.1, prompt, psnr - 8))
    base = {"method": "lite", "target": 0.5, "name": "lite 0.5", "prompt": "cat"}
    append_record(second, {**base, "error": "cannot be reached"})
    append_record(second, _record("bra", 0.5, "cat", 11.0))  # its worker died before the dog
    return tmp_path


def test_a_row_is_taken_once(tmp_path: Path) -> None:
    one, two = RowQueue(tmp_path, "a"), RowQueue(tmp_path, "b")
    assert one.take("auto 0.5")
    assert not two.take("auto 0.5")
    assert two.take("auto 0.3")
    one.clear()
    assert two.take("auto 0.5")


def test_a_shared_result_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> np.ndarray[Any, Any]:
        made.append(1)
        return np.arange(6).reshape(2, 3)

    for owner in ("a", "b"):
        assert np.array_equal(RowQueue(tmp_path, owner).shared("dense", make), np.arange(6).reshape(2, 3))
    assert len(made) == 1


def test_a_result_of_a_worker_that_is_gone_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_table_queue._WAIT", 0.0)
    assert RowQueue(tmp_path, "gone").take("dense")
    assert RowQueue(tmp_path, "b").shared("dense", lambda: np.ones(2)).tolist() == [1, 1]


def test_what_is_left_to_do(folder: Path) -> None:
    from methods_table import finished, options_of, rows_of, warmup_of

    assert finished(folder, 2) == {FLOOR, "auto 0.5", "auto 0.1", "sol 0.5", "lite 0.5"}
    args = argparse.Namespace(density=[0.5, 0.1], methods=["adaspa", "sparge"], steps=30, options='{"end": 0.9}')
    assert rows_of(args) == [(FLOOR, None), ("adaspa", 0.5), ("sparge", 0.5), ("adaspa", 0.1), ("sparge", 0.1)]
    assert [warmup_of("adaspa", density, args) * args.steps for density in (0.5, 0.3, 0.2, 0.1)] == [6, 3, 2, 1]
    assert warmup_of("sparge", 0.5, args) == 0
    assert options_of(None, "adaspa", 0.5, args) == {"run_density": 0.5, "warmup": 0.2, "end": 0.9}


def test_the_later_sample_counts(folder: Path) -> None:
    append_record(folder / "samples_2.jsonl", _record("auto", 0.5, "dog", 25.0))
    (row,) = [r for r in summary(read_samples(folder)) if r["name"] == "auto 0.5"]
    assert row["psnr"] == 27.5
    assert row["worst"] == 25.0
    assert row["samples"] == 2


def test_tables_mark_what_took_more_and_name_what_is_missing(folder: Path) -> None:
    rows = summary(read_samples(folder))
    text = tables(rows)
    assert "| `sol` | 0.600 † | 24.00 | 19.0 |" in text
    assert "Cannot reach it: `lite`." in text
    assert "Not run: `bra`, `lite`, `sol`." in text
    assert text.index("`auto`") < text.index("`sol`") < text.index("`bra`")
    assert "| `sol` | 24.00 (0.044) † | not run |" in overview(rows)
    assert rank_correlation([r for r in rows if r["target"] == 0.5 and "error" not in r], "psnr", "ssim") == 1.0


def test_the_page_is_renewed_and_the_picture_lies_beside_it(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs/assets").mkdir(parents=True)
    page = tmp_path / "docs/page.md"
    parts = [f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in ("overview", "tables", "ranks")]
    page.write_text("\n".join(["Words.", *parts, "More words."]))
    join(folder, page)
    text = page.read_text()
    assert text.startswith("Words.")
    assert text.endswith("More words.")
    assert "old" not in text
    assert "| `auto` | 25.00 (0.042) | 17.00 (0.064) |" in text
    assert (tmp_path / "docs/assets/methods_pareto.svg").read_bytes().startswith(b"<?xml")
    assert len(json.loads((folder / "methods_table.json").read_text())["rows"]) == 6
    with pytest.raises(SystemExit, match="once each"):
        renewed("no marks", "ranks", "")


def test_the_committed_page_is_what_the_records_say() -> None:
    rows = summary(read_samples(ROOT / "benchmarks/results/methods_table"))
    page = (ROOT / "docs/methods_table.md").read_text(encoding="utf-8")
    assert overview(rows) in page
    assert tables(rows) in page
