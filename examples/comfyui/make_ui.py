"""Write ``example_workflows/X.json``, a template in ComfyUI, from ``X.api.json``, which its ``/prompt`` takes.

``python examples/comfyui/make_ui.py http://127.0.0.1:8188`` asks a running ComfyUI with these nodes for the order of their
inputs. Nodes stand in columns by their distance from the start.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
TEMPLATES = HERE.parents[1] / "example_workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
Graph = dict[str, dict[str, Any]]


def specs_of(info: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a node in the order in which they are shown."""
    inputs = info["input"]
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


def is_widget(spec: list[Any]) -> bool:
    return isinstance(spec[0], list) or spec[0] in WIDGETS


def column(graph: Graph, name: str) -> int:
    """Longest way from a node without inputs."""
    before = [value[0] for value in graph[name]["inputs"].values() if isinstance(value, list)]
    return 1 + max((column(graph, other) for other in before), default=-1)


def values_of(node: dict[str, Any], specs: dict[str, Any]) -> list[Any]:
    """Values of the widgets; a seed is followed by what happens to it after a run."""
    values: list[Any] = []
    for name, spec in specs.items():
        if not is_widget(spec):
            continue
        options = spec[1] if len(spec) > 1 else {}
        values.append(node["inputs"].get(name, options.get("default")))
        if options.get("control_after_generate") or name in ("seed", "noise_seed"):
            values.append("fixed")
    return values


def convert(graph: Graph, info: dict[str, Any]) -> dict[str, Any]:
    """The graph as ComfyUI's editor stores it."""
    nodes, links, heights = [], [], dict[int, int]()
    by_name = {}
    for order, (name, node) in enumerate(
        sorted(graph.items(), key=lambda item: (column(graph, item[0]), int(item[0])))
    ):
        known = info[node["class_type"]]
        specs = specs_of(known)
        values = values_of(node, specs)
        place = column(graph, name)
        sockets = [key for key, spec in specs.items() if not is_widget(spec)]
        height = 60 + 26 * (max(len(sockets), len(known["output"])) + len(values))
        top = heights.get(place, 60)
        heights[place] = top + height + 60
        by_name[name] = made = {
            "id": int(name),
            "type": node["class_type"],
            "pos": [60 + 420 * place, top],
            "size": [360, height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [{"name": key, "type": specs[key][0], "link": None} for key in sockets],
            "outputs": [
                {"name": title, "type": kind, "links": [], "slot_index": slot}
                for slot, (title, kind) in enumerate(zip(known["output_name"], known["output"]))
            ],
            "properties": {"Node name for S&R": node["class_type"]},
            "widgets_values": values,
        }
        nodes.append(made)
    for made in nodes:
        for slot, socket in enumerate(made["inputs"]):
            source = graph[str(made["id"])]["inputs"].get(socket["name"])
            if source is None:
                continue
            link = len(links) + 1
            socket["link"] = link
            by_name[source[0]]["outputs"][source[1]]["links"].append(link)
            links.append([link, int(source[0]), source[1], made["id"], slot, socket["type"]])
    return {
        "last_node_id": max(map(int, graph)),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 1.0, "offset": [0, 0]}},
        "version": 0.4,
    }


def main() -> None:
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info", timeout=60) as answer:
        info = json.load(answer)
    for path in sorted(HERE.glob("*.api.json")):
        made = convert(json.loads(path.read_text(encoding="utf-8")), info)
        target = TEMPLATES / path.name.replace(".api.json", ".json")
        target.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
