"""Base checkpoints: the weights of the frozen MobileSAM, their source and their hash."""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from nucseg.errors import InputError
from nucseg.files import ASSETS, sha256
from nucseg.model.sam import Encoder, build_sam, part, sam_shapes

MOBILE_SAM_URL = (
    "https://github.com/ChaoningZhang/MobileSAM/raw/f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/mobile_sam.pt"
)
MOBILE_SAM_SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
MOBILE_SAM_BYTES = 40_728_226
INSTANCE_HEAD = "instance_head."  # prefix of the instance head that a base may include; not part of MobileSAM
OFFLINE = ASSETS / "offline.safetensors"
SHIPPED = {path.stem: path for path in (OFFLINE, ASSETS / "broad.safetensors")}
CHOICES = (
    "'auto' (mobile_sam if it was downloaded, else offline), 'mobile_sam' (the official checkpoint, downloaded "
    "once), 'offline' or 'broad' (ship with nucseg, not MobileSAM's weights), 'random', or the path of a mobile_sam.pt"
)


@dataclass(frozen=True)
class Base:
    """A frozen base: its name, its weights under MobileSAM's own names, and the SHA-256 that identifies it.

    ``stored``: the weights that it has, of the encoder at least. The hash is that of the file, or for ``random`` that
    of the tensors' bytes, in the order of their names.
    """

    name: str
    stored: dict[str, Tensor]
    sha256: str

    @functools.cached_property
    def state(self) -> dict[str, Tensor]:
        """All weights: a prompt encoder and mask decoder that are not stored are untrained, from `random_base`."""
        whole = sam_shapes().keys() <= self.stored.keys()
        return self.stored if whole else random_base(0).state | self.stored


def cache_folder() -> Path:
    """Return the folder for downloads: ``$NUCSEG_CACHE``, else the system's cache folder for nucseg."""
    return Path(os.environ.get("NUCSEG_CACHE") or pooch.os_cache("nucseg"))


def resolve_base(name: str) -> str:
    """Resolve ``auto``: mobile_sam if its checkpoint is in the cache, else offline. Other names are returned as is."""
    if name != "auto":
        return name
    return "mobile_sam" if (cache_folder() / "mobile_sam.pt").is_file() else "offline"


def load_base(name: str = "auto", seed: int = 0) -> Base:
    """Load a base by name: ``mobile_sam``, ``offline``, ``broad``, ``random`` (untrained, under ``seed``), or by path.

    ``auto`` is the best base that needs no download (`resolve_base`). Other names never fall back to another base.
    Raises ``InputError`` for an unknown name, a missing or damaged file, a wrong hash, or a download without
    network.
    """
    name = resolve_base(name)
    if name == "random":
        return random_base(seed)
    if name in SHIPPED:
        return offline_base(SHIPPED[name])
    if name == "mobile_sam":
        return Base(name, read_checkpoint(fetch_mobile_sam()), MOBILE_SAM_SHA256)
    path = Path(name)
    if not path.is_file():
        raise InputError(f"Base {name!r} is neither a known base nor a file: choose {CHOICES}.")
    if path.suffix == ".safetensors":  # written by nucseg pretrain
        return offline_base(path)
    digest = sha256(path)
    known = "mobile_sam" if digest == MOBILE_SAM_SHA256 else path.name
    return Base(known, read_checkpoint(path), digest)


def fetch_mobile_sam(url: str = MOBILE_SAM_URL, known_sha256: str = MOBILE_SAM_SHA256) -> Path:
    """Download MobileSAM's checkpoint (41 MB, Apache-2.0) into the cache once; return its path.

    The file is downloaded under a temporary name and moved into place only if its SHA-256 is right.
    Raises ``InputError`` if the download fails or the hash is wrong.
    """
    try:
        path = pooch.retrieve(
            url,
            known_hash=f"sha256:{known_sha256}",
            fname="mobile_sam.pt",
            path=cache_folder(),
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=30),
        )
    except requests.RequestException as error:
        raise InputError(
            f"MobileSAM's checkpoint could not be downloaded from {url} ({type(error).__name__}): connect to the "
            f"network, or choose another base: {CHOICES}."
        ) from error
    except ValueError as error:  # pooch raises this for a wrong hash
        raise InputError(
            f"The file downloaded from {url} is not MobileSAM's checkpoint (its SHA-256 differs, so it was "
            "deleted): try again, or download it by hand and give its path as the base."
        ) from error
    return Path(path)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a MobileSAM checkpoint: tensors by MobileSAM's names. Code in the file is never run.

    Raises ``InputError`` for a file that torch cannot read as plain tensors, or whose names or shapes are
    not MobileSAM's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        raise InputError(
            f"{path}: not a readable checkpoint of plain tensors; download mobile_sam.pt again."
        ) from error
    expected = sam_shapes()
    found = {n: t.shape for n, t in state.items() if isinstance(t, Tensor)} if isinstance(state, dict) else {}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise InputError(f"{path}: not a MobileSAM checkpoint ({len(wrong)} entries differ, {wrong[0]} first).")
    return state


def offline_base(path: str | Path = OFFLINE) -> Base:
    """A base such as those that ship with the package: an encoder trained by ``nucseg pretrain``, stored in float16.

    The instance head that was trained with it is included under ``instance_head.``. The prompt encoder and mask decoder
    are untrained (`Base.state`).
    Raises ``InputError`` for a missing or damaged file.
    """
    path = Path(path)
    try:
        encoder = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: this base cannot be read; choose {CHOICES}.") from error
    expected = {name: shape for name, shape in sam_shapes().items() if name.startswith("image_encoder.")}
    found = {name: t.shape for name, t in encoder.items() if not name.startswith(INSTANCE_HEAD)}
    if found != expected:
        raise InputError(f"{path}: not an encoder of MobileSAM's architecture; make it again with nucseg pretrain.")
    name = path.stem if path in SHIPPED.values() else path.name
    return Base(name, encoder, sha256(path))


@functools.cache
def random_base(seed: int = 0) -> Base:
    """MobileSAM's architecture with its own random initialisation, as a control without pretraining.

    The running statistics of the encoder's BatchNorm layers come from seeded noise. With the initial statistics (mean
    0, variance 1) and frozen weights, the signal would fade from layer to layer, and nothing could be learnt.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_sam().state_dict()
        statistics = _batchnorm_statistics(part(state, "image_encoder."), seed)
    digest = hashlib.sha256()  # excludes the statistics, whose last digits depend on the processor
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return Base("random", state | {f"image_encoder.{n}": t for n, t in statistics.items()}, digest.hexdigest())


@torch.no_grad()
def _batchnorm_statistics(encoder_state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The encoder's BatchNorm buffers after one pass over noise with the spectrum of natural images."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(8, 3, 128, 128)  # about mean 0 and variance 1, as after SAM's normalisation
    for side in (4, 8, 16, 32, 64, 128):
        octave = torch.randn(8, 3, side, side, generator=generator) / 6**0.5
        x += F.interpolate(octave, size=128, mode="bilinear", align_corners=False)
    encoder = Encoder()
    encoder.load_state_dict(encoder_state)
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches, not a running one
    encoder(x)
    return {name: t for name, t in encoder.state_dict().items() if "running_" in name}
