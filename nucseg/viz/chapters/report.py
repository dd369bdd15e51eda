"""Tables and figures of the chapter "The report, side by side"."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from nucseg.records.runs import Run
from nucseg.records.statistics import difference
from nucseg.viz import figures

NAMES = {"dice": "Dice", "iou": "IoU", "aji": "AJI", "pq": "PQ", "sq": "SQ", "rq": "RQ"}


def printed(reference: Path, number: int) -> pd.DataFrame:
    """Table ``number`` of the report, 1 to 4, as it prints it: the columns of ``report_tables.csv`` that it has.

    Index: the names of the rows, except for table 4, whose rows have none.
    """
    tables = pd.read_csv(reference / "report_tables.csv")
    table = tables[tables["table"] == number].drop(columns="table").dropna(axis="columns")
    return table.set_index("row").rename_axis(None) if "row" in table else table.reset_index(drop=True)


def blocks(tables: dict[str, pd.DataFrame], caption: str) -> Styler:
    """Tables of scores, one below the other, each under its name; missing scores are left blank."""
    table = pd.concat(tables).rename_axis([None, None])
    table = table.rename(columns=NAMES | {"aji_matched_only": "AJI, matched only"})
    return table.style.format("{:.3f}", na_rep="").set_caption(caption)


def rate_name(rate: float) -> str:
    """A learning rate as the report writes it: 3e-4 rather than 0.0003."""
    return f"{rate:.0e}".replace("e-0", "e-")


def search_table(rows: pd.DataFrame) -> Styler:
    """Rows of the report's Table 4 beside its result file and our search.

    ``rows``: columns ``rank``, ``alpha``, ``lr``, ``dice`` (as printed), ``val_dice`` and ``place`` (in the file, among
    all configurations), ``val`` and ``our place`` (in our search).
    """
    heads = {"rank": "rank", "alpha": "alpha", "lr": "rate", "dice": "printed", "val_dice": "its file"}
    heads |= {"place": "place", "val": "ours", "our place": "our place"}
    table = rows.assign(lr=rows["lr"].map(rate_name))[list(heads)].rename(columns=heads)
    style = table.style.format("{:.4f}", subset=["printed", "its file"]).format("{:.3f}", subset=["ours"])
    style = style.format("{:.0f}", subset=["place", "our place"]).hide()
    return style.set_caption("Table 4 (validation Dice), the search's result file, and our search")


def weights_table(counts: pd.DataFrame, mark: int) -> Styler:
    """Weights by kind of layer and rank, with one of the numbers marked."""
    style = counts.rename(columns="rank {}".format).style.format("{:,}")
    return style.highlight_between(left=mark, right=mark, props="font-weight: bold; text-decoration: underline")


def plot_touching(tissues: pd.DataFrame, named: dict[str, str]) -> Figure:
    """Draw Dice and PQ of every tissue over its share of touching nuclei, for the report and for us.

    ``tissues``: index tissue, columns ``touching`` (0..1), and (``dice``, ``pq``) with the suffixes ``_report`` and
    ``_ours``. ``named``: {tissue: text beside its PQ}.
    """
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.1), sharey=True)
    for ax, score in zip(axes, ("dice", "pq"), strict=True):
        for who, words, marker, colour in (
            ("report", "the report", "o", figures.SERIES[1]),
            ("ours", "ours", "^", figures.SERIES[0]),
        ):
            ax.scatter(tissues["touching"], tissues[f"{score}_{who}"], s=20, marker=marker, color=colour, label=words)
        ax.set(title=NAMES[score], xlabel="share of nuclei that touch", ylim=(0, 1), xlim=(0, 0.9))
        ax.xaxis.set_major_formatter("{x:.0%}")
    for tissue, words in named.items():
        at = tissues.loc[tissue, "touching"], tissues.loc[tissue, "pq_report"]
        axes[1].annotate(words, at, xytext=(-7, -3), textcoords="offset points", ha="right", va="center", fontsize=9)
    axes[1].legend(loc="upper right")
    return figure


def plot_future(table: pd.DataFrame) -> Figure:
    """Draw paired differences with their intervals, one row per variant.

    ``table``: index the variant's name, columns ``difference``, ``low`` and ``high``.
    """
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 0.9 + 0.42 * len(table)))
    rows = range(len(table))
    ax.hlines(rows, table["low"], table["high"], color=figures.SERIES[0], linewidth=2)
    ax.plot(table["difference"], rows, "o", color=figures.SERIES[0], markersize=5)
    ax.axvline(0, color="0.5", linewidth=1, zorder=0)
    ax.set_yticks(rows, table.index)
    ax.invert_yaxis()
    ax.set(xlabel="change in PQ")
    return figure


PEERS = {"unet": "U-Net", "stardist": "StarDist", "cellpose": "Cellpose 3"}


def peer_differences(folder: Path, ours: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Ours minus each peer on the same images, by the peer's name: `difference` of the scores.

    ``folder``: results/peers. ``ours``: the scores of our run on the test images of fold 1.
    """
    scores = pd.read_csv(folder / "scores.csv")
    return {name: difference(ours, scores[scores["peer"] == peer]) for peer, name in PEERS.items()}


def peers_table(folder: Path, ours: Run) -> Styler:
    """Our run and the peers: mean scores, ours minus theirs in PQ with its interval, weights, and minutes of CPU."""
    scores, about = pd.read_csv(folder / "scores.csv"), json.loads((folder / "run.json").read_text())["peers"]
    rows, differences = {}, peer_differences(folder, ours.scores)
    for peer, name in PEERS.items():
        mean = scores[scores["peer"] == peer][["dice", "aji", "pq"]].mean()
        found = differences[name].loc["pq"]
        interval = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
        rows[name] = mean.to_dict() | {
            "PQ, ours minus theirs": interval.replace("-", "−"),
            "trained weights": about[peer]["weights"],
            "minutes": about[peer]["cpu_seconds"] / 60,
        }
    rows["preset best"] = ours.scores[["dice", "aji", "pq"]].mean().to_dict() | {
        "PQ, ours minus theirs": "",
        "trained weights": ours.about["parameters"]["trainable"],
        "minutes": ours.about["seconds"] / 60,
    }
    formats: dict[Any, Any] = dict.fromkeys(("Dice", "AJI", "PQ"), "{:.3f}") | {
        "trained weights": "{:,}",
        "minutes": "{:.0f}",
    }
    return pd.DataFrame(rows).T.rename(columns=NAMES).style.format(formats)
