"""Inference engines behind one interface: PyTorch on any device, or OpenVINO on CPUs."""

import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from nucseg.errors import InputError
from nucseg.inference.options import ENGINES
from nucseg.model.merged import Merged, merged
from nucseg.model.network import NucleiModel, is_plain

STRIDE = 16  # px: the sides of an engine's input are multiples of it


class Engine(Protocol):
    """A network that is ready to run. ``name``: torch or openvino. ``n_maps``: number of maps that it predicts."""

    name: str
    n_maps: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 RGB, sides multiples of 16 px -> (B, C, H, W) float32 target maps, 0..1."""


class TorchEngine:
    """The merged network in torch, on the model's device and in its precision."""

    name = "torch"

    def __init__(self, model: NucleiModel):
        self.network, self.device, self.n_maps = merged(model), model.mean.device, model.n_maps

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 RGB -> (B, C, H, W) float32 target maps, 0..1."""
        batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return self.network(batch.to(self.device, non_blocking=True)).cpu().numpy()


class OpenVINOEngine:
    """The merged network, compiled by OpenVINO for this CPU once per image size.

    It uses torch's number of threads. Compiling takes a few seconds, so this engine pays off for large or many images.
    """

    name = "openvino"

    def __init__(self, model: NucleiModel):
        if find_spec("openvino") is None:
            raise InputError("The engine openvino needs the package openvino: run pip install 'nucseg[openvino]'.")
        if model.mean.device.type != "cpu":
            raise InputError("The engine openvino runs on CPUs: pass --device cpu, or choose another engine.")
        self.network, self.precision = merged(model), {"float32": "f32", "bfloat16": "bf16"}[model.precision]
        self.network.model.precision = "float32"  # OpenVINO lowers the precision itself
        self.n_maps = model.n_maps
        self.compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 RGB -> (B, C, H, W) float32 target maps, 0..1."""
        if images.shape[1:3] not in self.compiled:
            self.compiled[images.shape[1:3]] = _compile(self.network, images.shape[1:3], self.precision)
        run = self.compiled[images.shape[1:3]]
        return np.concatenate([run(image.transpose(2, 0, 1)[None])[0] for image in images])


def _compile(network: Merged, shape: tuple[int, ...], precision: str) -> Any:
    import openvino

    from nucseg.model.sam import quiet_tracing

    example = torch.zeros(1, 3, *shape, dtype=torch.uint8)
    with quiet_tracing():
        model = openvino.convert_model(network, example_input=example, input=[1, 3, *shape])
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return openvino.Core().compile_model(model, "CPU", hints | {"PERFORMANCE_HINT": "LATENCY"})


_ready: "weakref.WeakKeyDictionary[NucleiModel, tuple[Any, Engine]]" = weakref.WeakKeyDictionary()


def engine_for(model: NucleiModel, name: str = "auto") -> Engine:
    """Return the engine of a model; it is cached until the model changes.

    ``name``: torch; openvino (extra ``openvino``); or auto: openvino if the model is on the CPU and OpenVINO is
    installed, else torch. Raises ``InputError`` for an unknown engine, or one that cannot run on this machine.
    """
    name = resolve(name, model)
    state = (name, model.precision, model.mean.device, tuple(p._version for p in model.parameters()))
    kept = _ready.get(model)
    if kept is None or kept[0] != state:
        kept = _ready[model] = state, (OpenVINOEngine if name == "openvino" else TorchEngine)(model)
    return kept[1]


def resolve(name: str, model: NucleiModel) -> str:
    """Return the engine's name, with ``auto`` replaced by the choice for this model.

    Raises ``InputError`` for an unknown name.
    """
    if name not in ENGINES:
        raise InputError(f"Engine {name!r} is not known: choose one of {', '.join(ENGINES)}.")
    if name != "auto":
        return name
    return "openvino" if model.mean.device.type == "cpu" and find_spec("openvino") else "torch"


def predict(
    engine: Engine, images: Sequence[np.ndarray], scale: float, side: tuple[int, int] | None = None
) -> list[np.ndarray]:
    """Predict the target maps of images of one size: (H, W, 3) uint8 RGB each -> (C, H, W) float32 each, 0..1.

    ``scale``: encoder pixels per image pixel. ``side``: (rows, columns) in encoder pixels, to which images are padded
    by reflection; None: the next multiples of 64. Plain images (`PLAIN`) get empty maps without running the network.
    """
    height, width = images[0].shape[:2]
    if any(plain := [is_plain(image) for image in images]):
        rest = [image for image, skipped in zip(images, plain, strict=True) if not skipped]
        found = iter(predict(engine, rest, scale, side) if rest else [])
        return [np.zeros((engine.n_maps, height, width), np.float32) if skipped else next(found) for skipped in plain]
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    side = side or (rows + -rows % 64, columns + -columns % 64)
    rows, columns = min(rows, side[0]), min(columns, side[1])  # the ends of fields are rounded to whole image pixels
    padding = ((0, side[0] - rows), (0, side[1] - columns), (0, 0))
    views = []
    for image in images:
        view = image if scale == 1 else np.asarray(_resized(image, columns, rows))
        views.append(np.pad(view, padding, mode="symmetric") if (rows, columns) != side else view)
    maps = engine(np.stack(views))[:, :, :rows, :columns]
    if (rows, columns) != (height, width):
        resized = F.interpolate(torch.from_numpy(maps), (height, width), mode="bilinear", align_corners=False)
        maps = resized.numpy()
    return list(maps)


def _resized(image: np.ndarray, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
