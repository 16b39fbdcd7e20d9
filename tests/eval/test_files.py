"""Files are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel_eval.files import append_record, read_records, replacing, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"half {1 // 0}")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_records_survive_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert read_records(path) == []
    append_record(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "psn')
    append_record(path, {"n": 3})
    assert read_records(path) == [{"n": 1}, {"n": 3}]
