"""Write the trained parts as a `WanPipeline` folder, in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from models import make_scheduler
from torch import nn

#: No file may exceed 16 MiB.
SHARD = "11MB"


def halved(module: nn.Module) -> nn.Module:
    """Copy a module to the CPU in bfloat16."""
    return copy.deepcopy(module).to("cpu", torch.bfloat16)


def export(
    folder: Path, vae: AutoencoderKLWan, transformer: nn.Module, text_encoder: nn.Module, tokenizer: Any
) -> None:
    """Save a folder that `WanPipeline.from_pretrained` reads."""
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=halved(text_encoder),
        transformer=halved(transformer),
        vae=halved(vae),
        scheduler=make_scheduler(),
    )
    pipe.save_pretrained(folder, max_shard_size=SHARD)
    _loosen(folder)


def _loosen(folder: Path) -> None:
    """Name the tokenizer's class as transformers 4 and 5 both do, and read the text encoder in float32.

    Unlike diffusers, transformers reads weights in the type they were saved in.
    """
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    path = folder / "text_encoder/config.json"
    path.write_text(path.read_text().replace('"bfloat16"', '"float32"'))
