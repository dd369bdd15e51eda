"""Figures and tables of the chapter on cross-validation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from nucseg.data.splits import Split
from nucseg.metrics import contingency, score
from nucseg.records.runs import Run
from nucseg.records.statistics import bootstrap_mean, summarise
from nucseg.viz import figures

NAMES = {"dice": "Dice", "iou": "IoU", "aji": "AJI", "pq": "PQ", "sq": "SQ", "rq": "RQ"}
KEYS = ["tissue", "stem"]  # what names an image in a table of scores
FOLD_COLOURS = (*figures.SERIES[:4], "#e69f00")


def plot_counting(truth: np.ndarray, predictions: Mapping[str, np.ndarray]) -> Figure:
    """Draw predictions of one small truth, each with the IoU of its pairs, its counts and its scores.

    ``truth``: (H, W) label map. ``predictions``: label maps of the same shape by title; two panels a row.
    """
    rows = -(-len(predictions) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(figures.WIDTH, 2.2 * rows), squeeze=False)
    for ax, (title, prediction) in zip(axes.flat, predictions.items(), strict=False):
        _counted(ax, truth, prediction)
        ax.set_title(title)
    for ax in axes.flat[len(predictions) :]:
        ax.axis("off")
    return figure


def _counted(ax: Axes, truth: np.ndarray, prediction: np.ndarray) -> None:
    plate = np.ones((*truth.shape, 3))
    plate[truth > 0] = (0.98, 0.88, 0.68)  # a pale version of the truth's orange
    ax.imshow(plate)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    for labels, colour, width in ((truth, figures.TRUTH, 4.0), (prediction, figures.SPURIOUS, 1.8)):
        ax.add_collection(LineCollection([xy for _, xy in figures.outlines(labels)], colors=colour, linewidths=width))
    table = contingency(truth, prediction)
    pairs = np.flatnonzero(table.iou > 0.1)
    for k in pairs:
        inside = (truth == table.true_ids[table.rows[k]]) & (prediction == table.predicted_ids[table.columns[k]])
        y, x = (axis.mean() for axis in np.nonzero(inside))
        ax.text(x, y, f"IoU\n{table.iou[k]:.2f}", ha="center", va="center", fontsize=9, linespacing=0.95)
    found = score(truth, prediction)
    tp = int((table.iou > 0.5).sum())
    counts = f"TP {tp}, FP {found.nuclei_predicted - tp}, FN {found.nuclei_true - tp}"
    ax.set_xlabel(f"{counts}\nDice {found.dice:.2f}  AJI {found.aji:.2f}  PQ {found.pq:.2f}", fontsize=9.5)


def fold_table(table: pd.DataFrame, splits: Sequence[Split]) -> Styler:
    """One row per fold: its images in each part, and what its test part holds.

    ``table``: one row per image, with columns ``tissue`` and ``nuclei``.
    """
    rows = []
    for split in splits:
        test, train = table.iloc[list(split.test)], table.iloc[list(split.train)]
        rows.append(
            {
                "fold": split.name.removeprefix("fold "),
                "train": len(split.train),
                "validation": len(split.val),
                "test": len(split.test),
                "nuclei in test": int(test["nuclei"].sum()),
                "tissues in test": test["tissue"].nunique(),
                "of them in train": len(set(test["tissue"]) & set(train["tissue"])),
            }
        )
    shown = pd.DataFrame(rows).style.hide(axis="index").format({"nuclei in test": "{:,}"})
    return shown.set_caption("The benchmark's five folds, with our validation part")


def plot_folds(table: pd.DataFrame, splits: Sequence[Split]) -> Figure:
    """Draw each image as a dot in the colour of the fold whose test part it is in, one row per tissue.

    ``table``: one row per image, with a column ``tissue``, in the order that the splits' indices refer to.
    """
    fold = np.zeros(len(table), int)
    for k, split in enumerate(splits):
        fold[list(split.test)] = k
    tissues = sorted(table["tissue"].unique(), reverse=True)
    row = table["tissue"].map({tissue: i for i, tissue in enumerate(tissues)}).to_numpy()
    column = table.groupby("tissue").cumcount().to_numpy()
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 6))
    for k, split in enumerate(splits):
        mine = fold == k
        marker = "os^Dv"[k % 5]
        ax.scatter(column[mine], row[mine], s=15, color=FOLD_COLOURS[k % 5], marker=marker, label=split.name, lw=0)
    ax.set_yticks(range(len(tissues)), [short_name(tissue) for tissue in tissues], fontsize=9)
    ax.set(xlabel="images of the tissue, very probably from one slide", ylim=(-0.8, len(tissues) - 0.2))
    ax.legend(ncols=5, loc="lower right", bbox_to_anchor=(1, 1), columnspacing=0.8, handletextpad=0.1)
    return figure


def short_name(tissue: str) -> str:
    """A tissue's name without what its folder adds in brackets, so that it fits beside a plot."""
    return tissue.replace(" (white and brown)_subscapula", ", subscapula").replace("_", ", ")


def gain_table(changes: pd.DataFrame) -> Styler:
    """Table of ``statistics.difference``: each mean difference with its intervals over images and over tissues.

    ``changes``: by score, or by anything and then by score.
    """

    def interval(low: str, high: str) -> list[str]:
        pairs = zip(changes[low], changes[high], strict=True)
        return [f"{a:+.3f} to {b:+.3f}".replace("-", "−") for a, b in pairs]

    shown = pd.DataFrame(
        {
            "difference": [f"{value:+.3f}".replace("-", "−") for value in changes["difference"]],
            "95%, images drawn": interval("low", "high"),
            "95%, tissues drawn": interval("tissue_low", "tissue_high"),
        },
        index=changes.index,
    )
    return shown.rename(index=NAMES).style


def plot_curves(runs: Mapping[str, Run]) -> Figure:
    """Draw the validation PQ of each run over its epochs, with a mark at the epoch that was kept."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 3))
    for k, (name, run) in enumerate(runs.items()):
        epoch, pq = run.history["epoch"], run.history["val_pq"]
        kept = int(pq.to_numpy().argmax())
        style: dict[str, Any] = {
            "color": FOLD_COLOURS[k % 5],
            "marker": "os^Dv"[k % 5],
            "label": name.replace("_", " "),
        }
        ax.plot(epoch, pq, **style, markersize=7, markevery=[kept])
    ax.set(xlabel="epoch", ylabel="validation PQ")
    ax.legend(ncols=5, loc="lower right", bbox_to_anchor=(1, 1), columnspacing=0.8, handlelength=1.2)
    return figure


def score_table(columns: Mapping[str, Mapping[str, Run]], report: pd.DataFrame) -> Styler:
    """The counterpart of the report's Table 1: the folds of the first column, and the means of all.

    ``columns``: the recorded runs of the folds by base and budget, as `nucseg.records.runs.study_runs` returns them.
    ``report``: the rows of the report's Table 1, with its mean under ``average``.
    """
    rows: dict[str, Any] = {}
    for n, (column, runs) in enumerate(columns.items()):
        means = pd.DataFrame({name.replace("_", " "): run.scores[list(NAMES)].mean() for name, run in runs.items()}).T
        if n == 0:
            rows |= {str(fold): means.loc[fold].to_dict() for fold in means.index}
        rows[f"mean, {column}"] = means.mean().to_dict()
    rows["mean, the report (its protocol)"] = report.loc["average", list(NAMES)].to_dict()
    shown = pd.DataFrame(rows).T.rename(columns=NAMES).style.format("{:.3f}")
    return shown.set_caption("Means over the test images of each fold, and the mean of the folds")


def plot_scores(scores: pd.DataFrame) -> Figure:
    """Draw the distribution of Dice, AJI and PQ over the test images of each fold, with the folds' means."""
    names = {key: NAMES[key] for key in ("dice", "aji", "pq")}
    long = scores.melt("fold", list(names), "score", "value").replace({"score": names})
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.2))
    grouped = {"data": long, "x": "score", "y": "value", "hue": "fold", "ax": ax}
    folds = scores["fold"].nunique()
    sns.boxenplot(**grouped, palette=FOLD_COLOURS[:folds], width=0.8, flier_kws={"s": 4}, linewidth=0.5)
    dots = {"palette": ["black"] * folds, "dodge": 0.64, "errorbar": None, "linestyle": "none", "markersize": 3}
    sns.pointplot(**grouped, **dots, legend=False)
    ax.set(xlabel="", ylabel="score of an image", ylim=(-0.02, 1))
    ax.legend(ncols=5, loc="lower right", bbox_to_anchor=(1, 1), columnspacing=0.8, handlelength=1)
    return figure


def plot_bootstrap(drawn: Mapping[str, np.ndarray], mean: float) -> Figure:
    """Draw the distributions of means over repeated draws, each with the interval that holds their middle 95%.

    ``drawn``: by what was drawn, (draws,) means. ``mean``: that of the images as they are.
    """
    figure, axes = plt.subplots(len(drawn), 1, figsize=(figures.WIDTH, 1.5 * len(drawn) + 0.5), sharex=True)
    edges = np.histogram_bin_edges(np.concatenate(list(drawn.values())), 60)
    for ax, (what, means), colour in zip(np.atleast_1d(axes), drawn.items(), figures.SERIES, strict=False):
        low, high = np.quantile(means, [0.025, 0.975])
        inside = (means >= low) & (means <= high)
        ax.hist(means, edges, color="0.85")
        ax.hist(means[inside], edges, color=colour)
        ax.axvline(mean, color="black", linewidth=1)
        ax.set_title(f"{what}: {low:.3f} to {high:.3f}")
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    np.atleast_1d(axes)[-1].set_xlabel("mean PQ of a draw")
    return figure


def interval_table(scores: pd.DataFrame) -> Styler:
    """Means of the folds with two 95% intervals: images drawn, and whole tissues drawn."""
    table = summarise(scores).loc[list(NAMES)]
    shown = pd.DataFrame(
        {
            "mean of folds": table["fold_mean"].map("{:.3f}".format),
            "images drawn": [f"{row.low:.3f} to {row.high:.3f}" for row in table.itertuples()],
            "tissues drawn": [f"{row.tissue_low:.3f} to {row.tissue_high:.3f}" for row in table.itertuples()],
        }
    )
    return shown.rename(index=NAMES).style.set_caption(
        f"Five folds, {len(scores)} test images: means and 95% intervals"
    )


def protocol_scores(folder: Path, runs: Mapping[str, Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of the same models under two protocols, one row per image and model.

    ``folder``: of the study's column, with a run's scores by the report's protocol in ``RUN/as-the-report``.
    ``runs``: those runs by name. Returns the scores by the benchmark's protocol, each image scored by one model, and
    those by the report's, each image scored by all, with ``part``: train, val, test or none, the image's part in the
    model's training. In the second, ``aji`` is what the report calls so, and ``aji_kumar`` the published AJI.
    """
    fair = pd.concat([run.scores for run in runs.values()], ignore_index=True)
    lenient = pd.concat([pd.read_csv(folder / name / "as-the-report" / "scores.csv") for name in runs])
    lenient = lenient.rename(columns={"aji": "aji_kumar", "aji_matched_only": "aji"})
    return fair, lenient.reset_index(drop=True)


def by_image(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean scores of each image over the models that scored it, so that each image counts once."""
    columns = [name for name in ("dice", "aji", "pq", "aji_kumar") if name in scores]
    return scores.groupby(KEYS)[columns].mean().reset_index()


def protocol_table(tables: Mapping[str, pd.DataFrame], changes: Mapping[str, pd.DataFrame]) -> Styler:
    """Means of per-image scores, and paired differences, with 95% intervals (images drawn).

    ``tables``: per-image scores by the words of their row. ``changes``: results of `statistics.difference` likewise.
    """
    names = {key: NAMES[key] for key in ("dice", "aji", "pq")}
    rows = {}
    for words, table in tables.items():
        rows[words] = {
            name: _interval(table[key].mean(), *bootstrap_mean(table[key].to_numpy())) for key, name in names.items()
        }
    for words, change in changes.items():
        line = change.loc[list(names)]
        values = zip(line["difference"], line["low"], line["high"], strict=True)
        rows[words] = dict(zip(names.values(), (_interval(*row, sign="+") for row in values), strict=True))
    return pd.DataFrame(rows).T.style.set_caption("The same weights under two protocols, with 95% intervals")


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})".replace("-", "−")


def ranking(published: pd.DataFrame, columns: Mapping[str, Mapping[str, Run]]) -> pd.DataFrame:
    """Published means and ours, best PQ first, with ``low`` and ``high`` of our PQ (95%, tissues drawn).

    ``published``: one row per method, with ``method``, ``dice``, ``aji`` and ``pq``. ``columns``: as in `score_table`.
    """
    rows = []
    for column, runs in columns.items():
        table = summarise(pd.concat([run.scores for run in runs.values()], ignore_index=True))
        own = {key: table.loc[key, "fold_mean"] for key in ("dice", "aji", "pq")}
        low, high = table.loc["pq", ["tissue_low", "tissue_high"]]
        rows.append({"method": column, **own, "low": low, "high": high})
    table = pd.concat([published[["method", "dice", "aji", "pq"]], pd.DataFrame(rows)], ignore_index=True)
    return table.sort_values("pq", ascending=False, ignore_index=True)


def ranking_table(table: pd.DataFrame) -> Styler:
    """Show a `ranking`; the best of each score in bold."""
    names = {key: NAMES[key] for key in ("dice", "aji", "pq")}
    shown = table[["method", *names]].rename(columns=names).style.hide(axis="index")
    shown = shown.format(dict.fromkeys(names.values(), "{:.3f}"))
    shown = shown.highlight_max(subset=list(names.values()), props="font-weight: bold")
    return shown.set_caption("NuInsSeg, five folds: published means and ours; the best of each column in bold")


def plot_ranking(table: pd.DataFrame) -> Figure:
    """Draw the PQ of a `ranking`: published means in grey, ours in blue with their interval."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 0.32 * len(table) + 0.6))
    for i, row in enumerate(table.iloc[::-1].to_dict("records")):
        own = pd.notna(row["low"])
        ax.plot(row["pq"], i, "o", color=figures.SERIES[0] if own else "0.45")
        if own:
            ax.plot([row["low"], row["high"]], [i, i], color=figures.SERIES[0], linewidth=2)
    ax.set_yticks(range(len(table)), table["method"].iloc[::-1])
    ax.set_xlabel("PQ")
    ax.grid(axis="x", color="0.9")
    return figure
