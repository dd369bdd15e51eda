"""What runs the network for inference: torch on any device, or OpenVINO on CPUs, behind one small interface."""

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
from nucseg.model.network import NucleiModel

STRIDE = 16  # px: sides of what an engine takes are multiples of it


class Engine(Protocol):
    """A network that is ready to run. ``name``: torch or openvino."""

    name: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 RGB, sides multiples of 16 px -> (B, C, H, W) float32 target maps, 0..1."""


class TorchEngine:
    """The merged network in torch, on the model's device and in its precision."""

    name = "torch"

    def __init__(self, model: NucleiModel):
        self.network, self.device = merged(model), model.mean.device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 RGB -> (B, C, H, W) float32 target maps, 0..1."""
        batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return self.network(batch.to(self.device, non_blocking=True)).cpu().numpy()


class OpenVINOEngine:
    """The merged network compiled by OpenVINO for this CPU, once for each size of image.

    The number of threads is torch's. Compiling takes some seconds, so this engine pays for large or many images.
    """

    name = "openvino"

    def __init__(self, model: NucleiModel):
        if find_spec("openvino") is None:
            raise InputError("The engine openvino needs the package openvino: run pip install 'nucseg[openvino]'.")
        if model.mean.device.type != "cpu":
            raise InputError("The engine openvino runs on CPUs: pass --device cpu, or choose another engine.")
        self.network, self.precision = merged(model), {"float32": "f32", "bfloat16": "bf16"}[model.precision]
        self.network.model.precision = "float32"  # OpenVINO lowers the precision itself
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
    """The engine of a model, kept until the model changes.

    ``name``: torch; openvino (extra ``openvino``); or auto: openvino if the model is on the CPU and OpenVINO is
    installed, else torch. Raises ``InputError`` for an unknown engine, or one that cannot run here.
    """
    name = resolve(name, model)
    state = (name, model.precision, model.mean.device, tuple(p._version for p in model.parameters()))
    kept = _ready.get(model)
    if kept is None or kept[0] != state:
        kept = _ready[model] = state, (OpenVINOEngine if name == "openvino" else TorchEngine)(model)
    return kept[1]


def resolve(name: str, model: NucleiModel) -> str:
    """The name of the engine that ``auto`` stands for with this model; other names are checked."""
    if name not in ENGINES:
        raise InputError(f"Engine {name!r} is not known: choose one of {', '.join(ENGINES)}.")
    if name != "auto":
        return name
    return "openvino" if model.mean.device.type == "cpu" and find_spec("openvino") else "torch"


def predict(
    engine: Engine, images: Sequence[np.ndarray], scale: float, side: tuple[int, int] | None = None
) -> list[np.ndarray]:
    """Target maps of images of one size: (H, W, 3) uint8 RGB each -> (C, H, W) float32 each, 0..1.

    The network sees ``scale`` px for each px, filled up by reflection to ``side`` (rows, columns) px, by default the
    next multiples of 64.
    """
    height, width = images[0].shape[:2]
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    side = side or (rows + -rows % 64, columns + -columns % 64)
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
