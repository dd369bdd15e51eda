"""Adapter files: LoRA and head weights with their configuration, and the adapters that ship with nucseg."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nucseg.errors import InputError
from nucseg.files import ASSETS, write_atomic

if TYPE_CHECKING:  # torch takes seconds to import, and the command line needs only the names of adapters
    from torch import Tensor

ADAPTER_FORMAT = "nucseg-adapter-1"
ADAPTERS = ASSETS / "adapters"
DEFAULT_ADAPTER = "nuinsseg-all"


def save_adapter(
    path: str | Path,
    tensors: "dict[str, Tensor]",
    config: dict[str, Any],
    base_sha256: str,
    decoding: dict[str, Any] | None = None,
) -> None:
    """Write an adapter as safetensors, with its configuration and its base's SHA-256 in the header.

    ``decoding``: the tuned decoding parameters (`inference.decoding.Decoding.to_dict`), stored in the header too.
    The file is written completely or not at all. Raises ``InputError`` if a tensor is not finite.
    """
    import torch
    from safetensors.torch import save_file

    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise InputError(f"{path}: not written, because {bad[0]} holds values that are not finite.")
    header = {"format": ADAPTER_FORMAT, "base_sha256": base_sha256, "config": json.dumps(config)}
    header |= {"decoding": json.dumps(decoding)} if decoding else {}
    with write_atomic(path) as part:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, metadata=header)


def read_adapter(path: str | Path) -> "tuple[dict[str, Tensor], dict[str, Any], str]":
    """Read an adapter: (tensors by name, configuration, SHA-256 of its base).

    Raises ``InputError`` for a missing, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such adapter file.")
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        config = json.loads(header.get("config", "null"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable adapter file ({error}); save it again.") from error
    if header.get("format") != ADAPTER_FORMAT or not isinstance(config, dict):
        raise InputError(f"{path}: a safetensors file, but not an adapter written by nucseg.")
    return tensors, config, header.get("base_sha256", "")


def read_decoding(path: str | Path) -> dict[str, Any]:
    """Read the decoding parameters stored by `save_adapter`; empty if the adapter has none.

    Raises ``InputError`` if they are damaged.
    """
    with safe_open(path, framework="pt") as handle:
        text = (handle.metadata() or {}).get("decoding", "{}")
    try:
        decoding = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: its decoding parameters are damaged ({error}); train or tune it again.") from error
    if not isinstance(decoding, dict):
        raise InputError(f"{path}: its decoding parameters are damaged; train or tune it again.")
    return decoding


def check_base(path: str | Path, adapter_sha256: str, base_sha256: str, base_name: str) -> None:
    """Raise ``InputError`` unless the adapter was trained on this base."""
    if adapter_sha256 != base_sha256:
        raise InputError(
            f"{path}: this adapter was trained on another base (SHA-256 {adapter_sha256[:12]}…) than "
            f"{base_name!r} ({base_sha256[:12]}…): name the base it was trained on."
        )


def adapters() -> list[str]:
    """Return the names of the adapters that ship with nucseg; each has a model card beside it."""
    return sorted(path.stem for path in ADAPTERS.glob("*.safetensors"))


def adapter_path(adapter: str | Path) -> Path:
    """Return the file of an adapter, given a file, a run's folder or a shipped adapter's name.

    Raises ``InputError`` for anything else.
    """
    path = Path(adapter)
    if path.suffix or path.is_file():
        return path
    if (path / "best.safetensors").is_file():  # the folder of a run
        return path / "best.safetensors"
    if str(adapter) not in adapters():
        raise InputError(f"Adapter {str(adapter)!r} is neither a file nor one that ships: {', '.join(adapters())}.")
    return ADAPTERS / f"{adapter}.safetensors"
