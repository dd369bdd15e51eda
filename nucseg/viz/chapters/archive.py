"""Figures and tables of the chapter *From one slide to an archive*."""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from nucseg.viz import figures


def recorded_speeds(results: Path) -> pd.DataFrame:
    """Every recorded speed, one row each, slowest first: what was timed, device, precision, megapixels per second.

    ``results``: the repository's folder. Read are throughput and large-image, and engines if it was recorded.
    """
    rows = []
    if (path := results / "throughput" / "run.json").exists():
        about = json.loads(path.read_text(encoding="utf-8"))
        for precision, key in (
            (about["precision"], "seconds_nucseg"),
            (about["own_precision"], "seconds_nucseg_own"),
        ):
            seconds = np.mean([row[key] for row in about["rows"]])
            rows.append(("in memory, 512 px", about["device"], precision, 512**2 / 1e6 / seconds))
    if (path := results / "large-image" / "run.json").exists():
        about = json.loads(path.read_text(encoding="utf-8"))
        name = f"file to files, {about['side_px']:,} px"
        rows.append((name, about["device"], "default precision", about["side_px"] ** 2 / 1e6 / about["seconds"]))
    if (path := results / "engines" / "throughput.csv").exists():
        side = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))["side_px"]
        for row in pd.read_csv(path).itertuples():
            name = f"in memory, {side:,} px, {row.engine}"
            rows.append((name, row.device, row.precision, row.megapixels_a_second))
    columns = ["what", "device", "precision", "megapixels_a_second"]
    return pd.DataFrame(rows, columns=columns).sort_values("megapixels_a_second", ignore_index=True)


def table_end_to_end(rows: Mapping[str, Mapping[str, float]]) -> Styler:
    """CPU seconds from image to label map, and how many times as fast as the report's design in equal precision.

    ``rows``: the entry of that name in results/end-to-end, by "engine, precision".
    """
    names = {"report": "the report's design", "torch": "nucseg, torch", "openvino": "nucseg, OpenVINO"}
    cells = [
        {
            "precision": precision,
            "system": names[engine],
            "CPU seconds": f"{row['seconds']:.2f}",
            "times as fast": f"{row['ratio']:.1f}",
        }
        for (engine, precision), row in ((name.split(", "), row) for name, row in rows.items())
    ]
    return pd.DataFrame(cells).style.hide(axis="index").set_caption("One image of 512 px on one CPU thread, medians")


def plot_speeds(speeds: pd.DataFrame) -> Figure:
    """Draw the table of `recorded_speeds` as bars, with the device under each name."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 0.8 + 0.62 * len(speeds)))
    bars = ax.barh(range(len(speeds)), speeds["megapixels_a_second"], color=figures.SERIES[0], height=0.55)
    ax.bar_label(bars, fmt="{:.2f}", padding=3)
    names = [f"{row.what}\n{row.precision}, {row.device}" for row in speeds.itertuples()]
    ax.set_yticks(range(len(speeds)), names)
    ax.set(xlabel="megapixels per second", xlim=(0, 1.15 * speeds["megapixels_a_second"].max()))
    return figure


def plot_stages(seconds: Mapping[str, float]) -> Figure:
    """Draw the seconds of each stage as one stacked bar, with its share of the total in the legend."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.2))
    left, total = 0.0, sum(seconds.values())
    colours = (*figures.SERIES, "#e69f00", "#56b4e9")
    for (name, value), colour in zip(seconds.items(), colours, strict=False):
        ax.barh(0, value, left=left, color=colour, edgecolor="white", label=f"{name} ({value / total:.0%})")
        left += value
    ax.set(xlabel="seconds", yticks=[], xlim=(0, total), ylim=(-0.5, 0.5))
    ax.spines["left"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def plot_memory(bytes_per_pixel: float, recorded: Mapping[int, float]) -> Figure:
    """Draw the memory of a whole image in memory against its side, and recorded peaks of ``nucseg predict``.

    ``bytes_per_pixel``: of an image that is held whole. ``recorded``: peaks in GiB by the image's side in px.
    """
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.2))
    sides = np.geomspace(1_000, 100_000, 50)
    ax.plot(sides, bytes_per_pixel * sides**2 / 2**30, color=figures.SERIES[1], label="nucseg.segment, arrays alone")
    ax.plot(
        list(recorded), list(recorded.values()), "o", color=figures.SERIES[0], label="nucseg predict, measured peak"
    )
    ax.set(xscale="log", yscale="log", xlabel="side of the image, px", ylabel="memory, GiB")
    ax.set_xticks([1_000, 10_000, 100_000], ["1,000", "10,000", "100,000"])
    ax.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    ax.legend(loc="upper left")
    return figure


def budget(hours: pd.DataFrame) -> Styler:
    """A table of hours with one row per speed, rounded to whole hours, without its index."""
    named = hours.rename(columns={"what": "measured", "megapixels_a_second": "megapixels/s"})
    named["precision"] = named["precision"].str.removesuffix(" precision")
    return named.style.format(precision=2).format("{:,.0f}", subset=["hours"]).hide(axis="index")
