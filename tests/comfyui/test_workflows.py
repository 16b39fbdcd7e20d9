"""The example workflows: both formats agree, and our nodes in them are declared as they are used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dit_accel import __version__
from dit_accel_patches.comfyui import NODE_CLASS_MAPPINGS
from dit_accel_patches.comfyui.settings import Settings, parse_blocks

ROOT = Path(__file__).absolute().parents[2]
FOLDER = ROOT / "examples/comfyui"
TEMPLATES = ROOT / "example_workflows"  # the name that ComfyUI looks for beside our __init__.py
NAMES = sorted(path.name.removesuffix(".api.json") for path in FOLDER.glob("*.api.json"))
SETTINGS = ("method", "quality", "density", "precision", "start_percent", "end_percent", "min_tokens", "block_size")


def read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.api.json").read_text()), json.loads((TEMPLATES / f"{name}.json").read_text())


def declared(kind: str) -> dict[str, Any]:
    inputs = NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()  # type: ignore[attr-defined]
    return {**inputs["required"], **inputs.get("optional", {})}


def test_there_are_workflows() -> None:
    assert len(NAMES) >= 3
    used = {node["class_type"] for name in NAMES for node in read(name)[0].values()}
    assert {"DitAccelAccelerate", "DitAccelCalibrate", "DitAccelCompare", "DitAccelStatistics"} <= used


def test_templates_are_those_that_comfyui_lists() -> None:
    assert sorted(path.stem for path in TEMPLATES.glob("*.json")) == NAMES
    for name in NAMES:  # the thumbnail has the same name
        assert (TEMPLATES / f"{name}.jpg").read_bytes()[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("name", NAMES)
def test_prompt_format(name: str) -> None:
    graph, _ = read(name)
    for node in graph.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                source = graph[value[0]]["class_type"]
                if source in NODE_CLASS_MAPPINGS:
                    assert value[1] < len(NODE_CLASS_MAPPINGS[source].RETURN_TYPES)  # type: ignore[attr-defined]
        if node["class_type"] not in NODE_CLASS_MAPPINGS:
            continue
        specs = declared(node["class_type"])
        required = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()["required"]  # type: ignore[attr-defined]
        assert set(required) <= set(node["inputs"]) <= set(specs)
        for key, value in node["inputs"].items():
            if isinstance(specs[key][0], list) and specs[key][0] != ["euler"] and specs[key][0] != ["simple"]:
                assert value in specs[key][0], (name, key, value)
        if node["class_type"] == "DitAccelAccelerate":
            Settings(
                **{key: node["inputs"][key] for key in SETTINGS},
                dense_blocks=parse_blocks(node["inputs"]["dense_blocks"]),
            )


@pytest.mark.parametrize("name", NAMES)
def test_editor_format_is_the_same_graph(name: str) -> None:
    graph, shown = read(name)
    assert shown["version"] == 0.4
    nodes = {node["id"]: node for node in shown["nodes"]}
    assert {str(i): node["type"] for i, node in nodes.items()} == {i: node["class_type"] for i, node in graph.items()}
    links = {link[0]: link for link in shown["links"]}
    assert len(links) == len(shown["links"]) == shown["last_link_id"]
    assert shown["last_node_id"] == max(nodes)
    for i, node in nodes.items():
        values = [v for v in graph[str(i)]["inputs"].values() if not isinstance(v, list)]
        for value in values:
            assert value in node["widgets_values"]
        if node["type"] in NODE_CLASS_MAPPINGS:
            outputs = [output["type"] for output in node["outputs"]]
            assert outputs == list(NODE_CLASS_MAPPINGS[node["type"]].RETURN_TYPES)  # type: ignore[attr-defined]
        connected = {s["name"]: links[s["link"]] for s in node["inputs"] if s["link"] is not None}
        wanted = {key: value for key, value in graph[str(i)]["inputs"].items() if isinstance(value, list)}
        assert {key: [str(link[1]), link[2]] for key, link in connected.items()} == wanted
        for link in connected.values():
            assert link[0] in nodes[link[1]]["outputs"][link[2]]["links"]
            assert nodes[link[1]]["outputs"][link[2]]["type"] == link[5]


def test_the_registry_can_read_what_it_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy, project = data["tool"]["comfy"], data["project"]
    assert re.fullmatch(r"[A-Za-z][\w.-]{1,99}", project["name"])
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    # A version that the build finds is found by the registry's client as text, in one assignment of this file.
    assert project["dynamic"] == ["version"]
    text = (ROOT / comfy["version"]["path"]).read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1] == __version__  # type: ignore[index]
    # One that it does not know makes it drop all of them.
    gpus = [name for name in project["classifiers"] if name.startswith("Environment ::")]
    assert gpus == ["Environment :: GPU :: NVIDIA CUDA"]
