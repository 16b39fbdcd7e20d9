"""Write the trained parts as a `FluxPipeline` folder, in bfloat16."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from parts import make_scheduler
from torch import nn
from transformers import PreTrainedTokenizerFast


def halved(module: nn.Module) -> nn.Module:
    """Copy a module to the CPU in bfloat16."""
    return copy.deepcopy(module).to("cpu", torch.bfloat16)


def export(
    folder: Path,
    vae: AutoencoderKL,
    models: nn.ModuleDict,
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    """Save a folder that `FluxPipeline.from_pretrained` reads; what stood there stays until all of it is written."""
    pipe = FluxPipeline(
        scheduler=make_scheduler(),
        vae=halved(vae),
        text_encoder=halved(models["pooled"]),
        tokenizer=tokenizers[0],
        text_encoder_2=halved(models["text"]),
        tokenizer_2=tokenizers[1],
        transformer=halved(models["transformer"]),
    )
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    _loosen(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _loosen(folder: Path) -> None:
    """Name the tokenizers' class as transformers 4 and 5 both do, and read the text encoders in float32.

    Unlike diffusers, transformers reads weights in the type they were saved in.
    """
    for name in ("model_index.json", "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for name in ("text_encoder/config.json", "text_encoder_2/config.json"):
        path = folder / name
        path.write_text(path.read_text().replace('"bfloat16"', '"float32"'))
