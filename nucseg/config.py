"""Configuration from dataclasses: the reason beside each default, TOML files, and checks of type."""

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from nucseg.errors import InputError

T = TypeVar("T")


def option(default: T, why: str) -> T:
    """A dataclass field with the words that say what it is and why it has this default (shown by ``--help``)."""
    return dataclasses.field(default=default, metadata={"why": why})


def options(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of a config class by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def apply(config: T, changes: dict[str, Any], source: str) -> T:
    """Return ``config`` with ``changes``. Raises ``InputError``, naming ``source``, for an unknown or ill-typed one.

    A whole number is accepted where a float is asked for; nothing else is converted.
    """
    known = options(type(config))
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise InputError(f"{source}: there is no option {name!r}; {hint}")
        wanted = type(getattr(config, name))
        if wanted is float and type(value) is int:
            changes = changes | {name: float(value)}
        elif type(value) is not wanted:
            raise InputError(f"{source}: option {name!r} takes a {wanted.__name__}, not {value!r}.")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file. Raises ``InputError`` for a missing or malformed one."""
    try:
        with open(path, "rb") as handle:
            return tomllib.load(handle)
    except OSError as error:
        raise InputError(f"{path}: the configuration file cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error}).") from error
