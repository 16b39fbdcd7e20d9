"""The report as a file: complete, escaped, within its size, honest about what is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dit_accel_eval.report import write_report, write_summary
from dit_accel_eval.report.page import asset


class Reader(HTMLParser):
    """Elements, scripts and visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._script: dict[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts.append((self._script, data))
        else:
            self.text += " " + data


def _read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="module")
def finished(build_run, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = build_run(tmp_path_factory.mktemp("report") / "run")
    assert write_report(folder) == folder / "report.html"
    return _read(folder / "report.html")


def _words(text: str) -> str:
    return " ".join(text.split())


def test_everything_asked_for_is_there(finished: Reader) -> None:
    text = _words(finished.text)
    for part in (
        "What speed cost: examples/tiny_wan",
        "Saves 38% of the attention work",
        "Clears the floor",
        "Clips, worst prompts first",
        "planning step",
        "warm-up",
        "a <note> of the engine",
        "lpips_alex is nan",
        "dit-accel eval --pipeline examples/tiny_wan --method auto,adaspa --out 'a <b>'",
        "versions.torch",
        "not installed",
        "temporal_flickering",
        "0.97 ± 0.01",
        "recalled mass",
        "abababab",
        "not pinned",
        "4 plans a run in 12 ms",
    ):
        assert part in text, part
    assert "not finished" not in text


def test_metrics_have_extractor_and_convention(finished: Reader) -> None:
    from dit_accel_eval.metrics import REGISTRY

    text = _words(finished.text)
    for name in ("psnr", "ssim", "lpips_alex"):
        assert _words(REGISTRY[name].convention) in text
    assert REGISTRY["lpips_alex"].extractor in text


def test_prompts_cannot_become_markup(finished: Reader) -> None:
    names = [tag for tag, _ in finished.tags]
    assert "b" not in names or "<b>bold</b>" in finished.text
    assert "a rocket </script><script>alert(1)</script>" in _words(finished.text)
    assert "whale {{ 7*7 }} {% raw %}" in _words(finished.text)
    kinds = [attributes.get("type") for tag, attributes in finished.tags if tag == "script"]
    assert kinds.count(None) == 1  # ours
    assert set(kinds) == {None, "application/json", "text/plain"}
    assert not any(name.startswith("on") for _, attributes in finished.tags for name in attributes)


def test_the_data_survive_the_escaping(finished: Reader) -> None:
    data = json.loads(next(text for attributes, text in finished.scripts if attributes.get("id") == "data"))
    assert {p["text"] for p in data["prompts"]} >= {"a rocket </script><script>alert(1)</script>"}
    assert [p["worst"] for p in data["prompts"]] == sorted(p["worst"] for p in data["prompts"])
    assert len(data["sheets"]) == 20
    cube = data["cubes"][0]
    assert cube["values"][0][1] == [-1, -1, -1]  # the layer that was not called
    assert cube["values"][7][0] == [300, 450, 600]


def test_the_policy_allows_our_script_alone_and_no_request(finished: Reader) -> None:
    policy = next(a["content"] for tag, a in finished.tags if tag == "meta" and a.get("http-equiv"))
    script = "".join(text for attributes, text in finished.scripts if not attributes)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    for tag, attributes in finished.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"https?://(?!www\.w3\.org)", asset("report/static/base.css") + script)


def test_an_unfinished_run_says_what_is_missing(build_run, tmp_path: Path) -> None:
    folder = build_run(
        tmp_path / "run",
        missing=(("auto 0.2", 2), ("auto 0.2", 3)),
        errors=(("adaspa 0.2", 1),),
        results=False,
    )
    write_report(folder)
    text = _words(_read(folder / "report.html").text)
    assert "This run is not finished" in text
    assert "17 of 20 samples were made" in text
    assert "2 of 4 samples missing (prompt 2, prompt 3)" in text
    assert "adaspa 0.2 : 1 of 4 samples failed (prompt 1): RuntimeError: out of memory <now>" in text
    assert "results.json is missing" in text
    assert "Over 2 of 4 samples only:" in text
    assert "Not measured in this run." in text
    summary = write_summary(folder).read_text()
    assert "**This run is not finished: 17 of 20 samples were made.**" in summary
    assert "auto 0.2: 2 samples missing" in summary


def test_a_run_with_nothing_but_settings_gives_a_report(build_run, tmp_path: Path) -> None:
    everything = tuple((name, i) for name in ("dense", "auto 0.5") for i in range(4))
    folder = build_run(tmp_path / "run", rows=["dense", "auto 0.5"], missing=everything, results=False)
    write_report(folder)
    text = _words(_read(folder / "report.html").text)
    assert "0 of 8 samples were made" in text
    assert "No sample was made." in text
    assert "No raw frames were kept" in text
    assert "0 of 8 samples were made" in write_summary(folder).read_text()


def test_the_size_is_kept_and_clips_give_way(build_run, tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", frames=17, size=(96, 128))
    full = write_report(folder).stat().st_size
    limit = 350_000
    assert full > limit
    assert write_report(folder, max_bytes=limit).stat().st_size <= limit
    assert "They were made smaller" in _words(_read(folder / "report.html").text)
    with pytest.raises(ValueError, match="max_bytes must be at least 300000 for a report, got 1000"):
        write_report(folder, max_bytes=1000)


def test_the_summary_is_markdown_that_shows_text_as_it_is(build_run, tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    text = write_summary(folder).read_text()
    assert text.startswith("# What speed cost: examples/tiny\\_wan\n")
    assert "<script>" not in text.split("## Command")[0]
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| ") and "PSNR" in line}
    assert widths == {6}
    rows = [line for line in text.splitlines() if re.match(r"\| (auto|adaspa)", line)]
    assert [row.split(" | ")[0] for row in rows] == ["| auto 0.5", "| auto 0.2", "| adaspa 0.2"]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)
    assert "```text\ndit-accel eval --pipeline" in text


def test_a_title_and_an_unwritable_folder(build_run, tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", rows=["dense", "auto 0.5"], prompts=["a"], frames=1)
    write_report(folder, title="One <image>")
    assert "One <image>" in _read(folder / "report.html").text
    (folder / "summary.md").mkdir()
    with pytest.raises(OSError):
        write_summary(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
