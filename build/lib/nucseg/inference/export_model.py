"""Export of the merged network for other programs: ONNX, TorchScript, and a bioimage.io package."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nucseg
from nucseg.errors import InputError
from nucseg.files import write_atomic, write_json
from nucseg.inference.segmenter import Segmenter
from nucseg.instances import CHANNELS
from nucseg.model.merged import Merged, merged
from nucseg.model.network import NucleiModel
from nucseg.model.sam import quiet_tracing

FORMATS = ("onnx", "torchscript", "bioimageio")
AGREE = 1e-3  # largest difference between the maps, 0..1, of an exported file and of the model
_NEEDS = {"onnx": ("onnx", "onnxruntime"), "torchscript": (), "bioimageio": ("onnx", "onnxruntime", "bioimageio.core")}


def export(
    model: NucleiModel, out: str | Path, tile: np.ndarray, formats: Sequence[str] = FORMATS
) -> dict[str, tuple[Path, float]]:
    """Write the merged network in float32 to the folder ``out``; return each file and the largest error of its maps.

    ``tile``: (H, W, 3) uint8 RGB, a test image. The files take images of its size, whose sides must be multiples of
    16 px: (1, 3, H, W) uint8 RGB in, (1, C, H, W) float32 target maps out. Each file is read again, run, and compared
    with the model. NAME.decoding.json holds the values that turn the maps into nuclei (`decoding`).

    Raises ``InputError`` for an unknown format, a missing package, a tile of another size, or maps that differ by more
    than ``AGREE``.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(f"Format {(unknown or [''])[0]!r} is not known: choose from {', '.join(FORMATS)}.")
    missing = [need for name in formats for need in _NEEDS[name] if not _installed(need)]
    if missing:
        raise InputError(f"The export needs the package {missing[0]}: run pip install 'nucseg[export]'.")
    if tile.ndim != 3 or tile.shape[2] != 3 or tile.dtype != np.uint8 or tile.shape[0] % 16 or tile.shape[1] % 16:
        raise InputError(f"The test tile must be (H, W, 3) uint8, sides multiples of 16 px, not {tile.shape}.")
    network = merged(model).cpu()
    network.model.precision = "float32"
    images = np.ascontiguousarray(tile.transpose(2, 0, 1)[None])
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    out, name = Path(out), model.adapter_name or "nucseg"
    written: dict[str, tuple[Path, float]] = {}
    if "torchscript" in formats or "bioimageio" in formats:
        written["torchscript"] = _torchscript(network, out / f"{name}.torchscript.pt", images, expected)
    if "onnx" in formats or "bioimageio" in formats:
        written["onnx"] = _onnx(network, out / f"{name}.onnx", images, expected)
    if "bioimageio" in formats:
        written["bioimageio"] = _bioimageio(model, out / f"{name}.bioimageio.zip", written, images, expected)
    write_json(out / f"{name}.decoding.json", decoding(model))
    return written


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _torchscript(network: Merged, path: Path, images: np.ndarray, expected: np.ndarray) -> tuple[Path, float]:
    with quiet_tracing(), torch.no_grad():
        traced = torch.jit.trace(network, torch.from_numpy(images), check_trace=False)
        with write_atomic(path) as part:
            traced.save(str(part))
        found = torch.jit.load(str(path))(torch.from_numpy(images)).numpy()
    return path, _agreed(path, found, expected)


def _onnx(network: Merged, path: Path, images: np.ndarray, expected: np.ndarray) -> tuple[Path, float]:
    import onnxruntime

    with quiet_tracing(), torch.no_grad(), write_atomic(path) as part:
        torch.onnx.export(
            network,
            (torch.from_numpy(images),),
            str(part),
            input_names=["image"],
            output_names=["maps"],
            opset_version=17,
            dynamo=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return path, _agreed(path, session.run(None, {"image": images})[0], expected)


def _agreed(path: Path, found: np.ndarray, expected: np.ndarray) -> float:
    difference = float(np.abs(found - expected).max())
    if not difference <= AGREE:
        path.unlink()
        raise InputError(f"'{path}' gives maps that differ from the model's by {difference:.2g}, so it is not kept.")
    return difference


def decoding(model: NucleiModel) -> dict[str, Any]:
    """Return what turns the maps into nuclei: the channels, and the arguments of `instances.decode` in image pixels."""
    segmenter = Segmenter([model])
    return {
        "channels": list(CHANNELS[: model.n_maps]),
        "threshold": segmenter.decoding().threshold,
        "ridge": segmenter.decoding().ridge,
        "smooth_px": segmenter.smooth(),
        "min_area_px": segmenter.smallest(),
        "um_per_px": model.config.um_per_px or None,
        "scale": segmenter.scale(model),  # encoder pixels per image pixel
    }


def _bioimageio(
    model: NucleiModel,
    path: Path,
    written: dict[str, tuple[Path, float]],
    images: np.ndarray,
    expected: np.ndarray,
) -> tuple[Path, float]:
    from bioimageio.core import test_model
    from bioimageio.spec import save_bioimageio_package
    from bioimageio.spec.model import v0_5 as spec

    folder = path.parent / f".{path.stem}.part"
    folder.mkdir(parents=True, exist_ok=True)
    tests = {"input": folder / "test_input.npy", "output": folder / "test_output.npy"}
    try:
        np.save(tests["input"], images)
        np.save(tests["output"], expected)
        text = folder / "README.md"
        text.write_text(_readme(model), encoding="utf-8")
        height, width = images.shape[2:]
        description = spec.ModelDescr(
            name=f"nucseg {model.adapter_name or 'nuclei'}",
            description="Target maps of nuclei in H&E images, from MobileSAM fine-tuned with LoRA (merged).",
            version=spec.Version(nucseg.__version__),
            authors=[spec.Author(name="nucseg maintainers")],
            maintainers=[],
            license=spec.LicenseId("Apache-2.0"),
            documentation=spec.FileDescr(source=text),
            tags=["nuclei", "histology", "instance-segmentation", "2d"],
            cite=[
                spec.CiteEntry(
                    text="Zhang et al. 2023, Faster Segment Anything (MobileSAM)",
                    url=spec.HttpUrl("https://arxiv.org/abs/2306.14289"),
                )
            ],
            inputs=[
                _tensor(spec, spec.InputTensorDescr, "image", ["r", "g", "b"], (height, width), "uint8", tests["input"])
            ],
            outputs=[
                _tensor(
                    spec,
                    spec.OutputTensorDescr,
                    "maps",
                    list(CHANNELS[: model.n_maps]),
                    (height, width),
                    "float32",
                    tests["output"],
                )
            ],
            weights=spec.WeightsDescr(
                onnx=spec.OnnxWeightsDescr(source=written["onnx"][0], opset_version=17),
                torchscript=spec.TorchscriptWeightsDescr(
                    source=written["torchscript"][0], pytorch_version=spec.Version(torch.__version__.split("+")[0])
                ),
            ),
            config=spec.Config.model_validate({"nucseg": {k: v for k, v in decoding(model).items() if v is not None}}),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_bioimageio_package(description, output_path=path)
            summary = test_model(path)
        if summary.status == "failed":
            path.unlink(missing_ok=True)
            raise InputError(f"'{path}' did not pass the test of bioimageio.core, so it is not kept.")
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return path, max(off for _, off in written.values())


def _tensor(
    spec: Any, kind: Any, name: str, channels: list[str], shape: tuple[int, int], dtype: str, test: Path
) -> Any:
    output = kind is spec.OutputTensorDescr
    space = [
        (spec.SpaceOutputAxis if output else spec.SpaceInputAxis)(id=spec.AxisId(axis), size=size)
        for axis, size in zip("yx", shape, strict=True)
    ]
    axes = [
        spec.BatchAxis(size=1),
        spec.ChannelAxis(channel_names=[spec.Identifier(channel) for channel in channels]),
        *space,
    ]
    data = spec.IntervalOrRatioDataDescr(type=dtype)
    return kind(id=spec.TensorId(name), axes=axes, test_tensor=spec.FileDescr(source=test), data=data)


def _readme(model: NucleiModel) -> str:
    values = decoding(model)
    lines = "\n".join(f"- {name}: {value}" for name, value in values.items())
    return (
        "# Nuclei in H&E images\n\n"
        "Input: RGB images (uint8). Output: target maps (0..1), the foreground and, if the model has one, the distance "
        "map. To find the nuclei, smooth the distance map, flood it from its peaks (watershed), and join basins that "
        f"no deep valley separates (`nucseg.decode`), with these values:\n\n{lines}\n\n"
        "## Validation\n\nThe exported files were compared with the model on the test tile. For scores, see nucseg's "
        "book.\n"
    )
