"""Reading pipeline folders: pictures and video, nothing from elsewhere, and errors that say which file is bad."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel_eval.pipelines import PipelineError, load_pipeline, pipeline_class

pytest.importorskip("diffusers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FLUX = EXAMPLES / "tiny_flux"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(FLUX, tmp_path / "model"))


def test_the_class_of_a_folder() -> None:
    assert pipeline_class(FLUX) == "FluxPipeline"
    assert pipeline_class(EXAMPLES / "tiny_wan") == "WanPipeline"


def test_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = load_pipeline(FLUX)
    assert type(pipe.transformer).__name__ == "FluxTransformer2DModel"
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder_2)} == {torch.float32}
    assert pipe.device.type == "cpu"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"nowhere/model_index\.json could not be read"):
        load_pipeline(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}'])
def test_a_damaged_index_is_named(text: str, folder: Path) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(PipelineError, match=r"model_index\.json could not be read: it is no pipeline index"):
        load_pipeline(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_cut_weights_are_an_error(part: str, folder: Path) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(PipelineError, match="model could not be loaded"):
        load_pipeline(folder)


def test_a_config_that_does_not_fit_is_an_error(folder: Path) -> None:
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_attention_heads": 2 + config["num_attention_heads"]}))
    with pytest.raises(PipelineError, match="model could not be loaded"):
        load_pipeline(folder)
