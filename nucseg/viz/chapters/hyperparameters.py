"""Figures and tables of the chapter *What LoRA is worth*."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from nucseg.records.runs import Run, results_folder
from nucseg.records.statistics import bootstrap_mean
from nucseg.viz import figures
from nucseg.viz.chapters import changes

FACTORS = ["rank", "alpha", "lr"]
# The options that say what is trained, and the seed
WHAT_IS_TRAINED = {"lora_target", "decoder_lora_target", "rank", "alpha", "lora_conv", "dora", "seed"}


# ---- what is trained -----------------------------------------------------------------------------------------


def describe(config: Mapping[str, Any]) -> str:
    """What a run's configuration trains, in words: "head only", "LoRA, rank 4", "LoRA, rank 8, on qkv"."""
    without_lora = {"none": "head only", "norms": "norms and biases", "full": "all weights"}
    if config["lora_target"] in without_lora:
        return without_lora[config["lora_target"]]
    text = f"{'DoRA' if config.get('dora') else 'LoRA'}, rank {config['rank']}"
    if config["alpha"] != config["rank"]:
        text += f", alpha {config['alpha']:g}"
    if config["lora_target"] != "all":
        places = {"mlp": "MLPs", "late": "late stages"}
        text += f", on {places.get(config['lora_target'], config['lora_target'])}"
    if config.get("lora_conv"):
        text += ", on Conv2d too"
    return text + (f", {config['decoder_lora_target']} of the decoder" if _adapts_decoder(config) else "")


def _adapts_decoder(config: Mapping[str, Any]) -> bool:
    return config.get("decoder_lora_target", "none") != "none"


def comparable(runs: Mapping[str, Run], reference: str) -> dict[str, Run]:
    """The runs that differ from the run ``reference`` in nothing but what they train, and the seed."""
    own = runs[reference].about["config"]
    found = {}
    for name, run in runs.items():
        config = run.about["config"]
        if all(config[option] == own[option] for option in (config.keys() & own.keys()) - WHAT_IS_TRAINED):
            found[name] = run
    return found


def groups(runs: Mapping[str, Run]) -> dict[str, list[Run]]:
    """Runs by what they train (`describe`), fewest trained weights first; a group's runs differ in seed or fold."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs.values(), key=lambda run: run.about["parameters"]["trainable"]):
        found.setdefault(describe(run.about["config"]), []).append(run)
    return found


def worth(runs: Mapping[str, Run], against: str) -> dict[str, pd.DataFrame]:
    """Paired differences of each group of runs to the group ``against``, by label.

    A run is compared with the run of ``against`` that has its fold and seed; an image that several seeds score is
    resampled as one.
    """
    found = groups(runs)
    partner = {_place(run): run for run in found[against]}
    return {
        label: pd.concat([changes.paired(run.scores, partner[_place(run)].scores) for run in group])
        for label, group in found.items()
        if label != against
    }


def _place(run: Run) -> tuple[Any, Any]:
    return run.about["config"]["fold"], run.about["config"]["seed"]


def table_worth(runs: Mapping[str, Run], against: str, costs: pd.DataFrame | None = None) -> Any:
    """What each group of runs trains, its seeds, mean PQ, paired differences to ``against``, and the time of a step.

    ``costs``: seconds per step by the runs' names (results/training-cost).
    """
    change = worth(runs, against)
    names = {id(run): name for name, run in runs.items()}
    rows = []
    for label, group in groups(runs).items():
        row: dict[str, Any] = {
            "what is trained": label,
            "weights": f"{group[0].about['parameters']['trainable']:,}",
            "seeds": len({run.about["config"]["seed"] for run in group}),
            "PQ": f"{np.mean([run.scores['pq'].mean() for run in group]):.3f}",
        }
        for score in ("pq", "dice"):
            text = changes.signed(*changes.interval(change[label], score)) if label in change else ""
            row[f"{changes.NAMES[score]} against {against}"] = text
        if costs is not None:
            row["s per step"] = f"{costs['seconds_a_step'].get(names[id(group[0])], np.nan):.2f}"
        rows.append(row)
    shown = pd.DataFrame(rows).style.hide(axis="index").set_table_styles(changes.TIGHT)
    return shown.set_caption("Paired differences with 95% intervals over images")


def plot_worth(runs: Mapping[str, Run], against: str) -> Figure:
    """Forest plot of `worth` in Dice, AJI and PQ."""
    return changes.plot(worth(runs, against), ("dice", "aji", "pq"))


def by_seed(runs: Mapping[str, Run], against: str) -> pd.DataFrame:
    """Mean difference in PQ to the group ``against``: one row per group, one column per seed."""
    found = groups(runs)
    partner = {_place(run): run for run in found[against]}
    rows = {
        label: {
            run.about["config"]["seed"]: changes.paired(run.scores, partner[_place(run)].scores)["pq"].mean()
            for run in group
        }
        for label, group in found.items()
        if label != against
    }
    return pd.DataFrame(rows).T.rename_axis(index="what is trained", columns="seed")


def costs(runs: Mapping[str, Run]) -> pd.DataFrame:
    """What each group of runs costs and gives: ``weights`` trained, ``seconds`` of its fastest epoch, mean ``pq``.

    The fastest epoch of all seeds is taken, because other work on the machine can only slow an epoch down.
    """
    rows = {
        label: {
            "weights": group[0].about["parameters"]["trainable"],
            "seconds": min(run.history["seconds"].min() for run in group),
            "pq": np.mean([run.scores["pq"].mean() for run in group]),
        }
        for label, group in groups(runs).items()
    }
    return pd.DataFrame(rows).T


def plot_costs(runs: Mapping[str, Run]) -> Figure:
    """PQ of every run against its trained weights and against seconds per epoch, in the colour of its group."""
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.2), sharey=True, gridspec_kw={"wspace": 0.12})
    table = costs(runs)
    for number, (label, group) in enumerate(groups(runs).items()):
        scores = [run.scores["pq"].mean() for run in group]
        for ax, name in zip(axes, ("weights", "seconds"), strict=True):
            ax.plot(
                [table.loc[label, name]] * len(scores),
                scores,
                "os^D"[number % 4],
                color=figures.SERIES[number % len(figures.SERIES)],
                alpha=0.8,
                label=label,
            )
    axes[0].set(xscale="log", xlabel="trained weights", ylabel="PQ", xlim=(1e5, 1e7))
    axes[0].set_xticks([1e5, 1e6, 1e7], ["0.1 M", "1 M", "10 M"])
    axes[0].minorticks_off()
    axes[1].set(xlabel="seconds per epoch")
    axes[1].set_xlim(0, None)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def stages(names: Sequence[str]) -> pd.Series:
    """How many of the layers ``names`` lie in the patch embedding and in each of TinyViT's four stages."""
    found = [re.match(r"patch_embed|layers\.\d", name) for name in names]
    where = pd.Series([match[0] if match else "rest" for match in found], dtype=str)
    return where.value_counts().sort_index()


# ---- the search ----------------------------------------------------------------------------------------------


def their_search() -> pd.DataFrame:
    """The report's search, from its result file: 36 rows with rank, alpha, lr, val_dice, test_dice and its place."""
    table = pd.read_csv(results_folder().parent / "book" / "reference" / "report_code_param_search.csv")
    return table.assign(place=table["val_dice"].rank(ascending=False).astype(int))


def table_4(search: pd.DataFrame) -> pd.DataFrame:
    """The report's Table 4 beside the result file: the printed Dice, the file's values, and the place of 36."""
    printed = pd.read_csv(results_folder().parent / "book" / "reference" / "report_tables.csv")
    printed = printed[printed["table"] == 4].rename(columns={"dice": "printed"})
    columns = [*FACTORS, "printed", "val_dice", "test_dice", "place"]
    return printed[[*FACTORS, "printed"]].merge(search, on=FACTORS)[columns].astype({"rank": int, "alpha": int})


def show_table_4(table: pd.DataFrame) -> Any:
    """`table_4` as the page shows it."""
    heads = ["rank", "alpha", "rate", "printed (val. Dice)", "file: val. Dice", "file: test Dice", "place of 36"]
    formats: Any = {"lr": "{:g}", **dict.fromkeys(["printed", "val_dice", "test_dice"], "{:.4f}")}
    styled = table.style.format(formats).hide(axis="index").relabel_index(heads, axis="columns")
    return styled.set_caption("The report's Table 4 beside the result file of its search")


def our_search(runs: Mapping[str, Run]) -> pd.DataFrame:
    """The test scores of all runs of a search: one row per run and image, with rank, alpha, lr and val_dice added."""
    rows = []
    for run in runs.values():
        config = {name: run.about["config"][name] for name in FACTORS}
        rows.append(run.scores.assign(**config, val_dice=run.history["val_dice"].max()))
    return pd.concat(rows, ignore_index=True)


def configurations(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per configuration of `our_search`: val_dice over folds; dice, aji, pq over images, with intervals."""
    rows = []
    for values, group in scores.groupby(FACTORS):
        row: dict[str, Any] = dict(zip(FACTORS, values, strict=True))
        row["val_dice"] = group.groupby("fold")["val_dice"].first().mean()
        for name in ("dice", "aji", "pq"):
            row[name] = group[name].mean()
            row[f"{name}_low"], row[f"{name}_high"] = bootstrap_mean(group[name].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def table_search(ours: pd.DataFrame, best: int = 12) -> Any:
    """The ``best`` configurations by validation Dice, with their mean test scores and intervals."""
    shown = ours.sort_values("val_dice", ascending=False, ignore_index=True)[:best]
    for name in ("dice", "aji", "pq"):
        low, high = shown[f"{name}_low"], shown[f"{name}_high"]
        shown[name] = [f"{m:.3f} ({a:.3f} to {b:.3f})" for m, a, b in zip(shown[name], low, high, strict=True)]
    shown = shown[[*FACTORS, "val_dice", "dice", "aji", "pq"]]
    heads = ["rank", "alpha", "rate", "val. Dice", "test Dice", "test AJI", "test PQ"]
    styled = shown.style.format({"alpha": "{:g}", "lr": "{:g}", "val_dice": "{:.3f}"}).hide(axis="index")
    return styled.relabel_index(heads, axis="columns").set_caption(
        f"The best {len(shown)} of {len(ours)} configurations by validation Dice; intervals over test images"
    )


def plot_shares(shares: pd.DataFrame) -> Figure:
    """Stacked bars: the share of the variance that each factor explains, one bar per row of ``shares``."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 0.9 + 0.38 * len(shares)))
    start = np.zeros(len(shares))
    names = {"lr": "learning rate"}
    for name, colour in zip(shares, [*figures.SERIES[:3], "0.8"], strict=True):
        bars = ax.barh(shares.index, shares[name], left=start, color=colour, label=names.get(str(name), name))
        for bar, share in zip(bars, shares[name], strict=True):
            if share > 0.06:
                ax.annotate(
                    f"{share:.0%}",
                    (bar.get_x() + share / 2, bar.get_y() + bar.get_height() / 2),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=figures.ink(colour),
                )
        start += shares[name].to_numpy()
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="share of the variance")
    figure.legend(*ax.get_legend_handles_labels(), ncols=4, loc="outside upper right")
    return figure


def plot_grids(searches: Mapping[str, pd.DataFrame]) -> Figure:
    """Heat maps of the validation Dice, one per search: rank and alpha against the learning rate."""
    figure, axes = plt.subplots(1, len(searches), figsize=(figures.WIDTH, 4.2), sharey=True, squeeze=False)
    for ax, (title, search) in zip(axes[0], searches.items(), strict=True):
        values = search.pivot_table(index=["rank", "alpha"], columns="lr", values="val_dice")
        sns.heatmap(
            values.rename(columns="{:g}".format),
            ax=ax,
            cmap="cividis",
            annot=True,
            fmt=".3f",
            annot_kws={"fontsize": 9},
            cbar=False,  # each cell says its value
            linewidths=0.5,
            yticklabels=[f"r {r:g}, α {a:g}" for r, a in values.index],
        )
        for text, fill in zip(ax.texts, ax.collections[0].get_facecolor(), strict=True):
            text.set_color(figures.ink(fill))
        ax.set(title=title, xlabel="learning rate", ylabel="")
        ax.tick_params(length=0, rotation=0)
    return figure


def factor_changes(scores: pd.DataFrame, factor: str, reference: float) -> dict[str, pd.DataFrame]:
    """Paired differences in the scores of `our_search` when ``factor`` alone changes, by its value.

    Differences to ``reference`` are taken image by image at equal other factors, then averaged over these factors.
    """
    names = ["dice", "aji", "pq"]
    keys = [*changes.KEYS, *(name for name in FACTORS if name != factor)]
    by_value: dict[Any, pd.DataFrame] = {v: part.set_index(keys)[names] for v, part in scores.groupby(factor)}
    return {
        f"{factor} {value:g} against {reference:g}": (part - by_value[reference])
        .groupby(level=changes.KEYS)
        .mean()
        .reset_index()
        for value, part in by_value.items()
        if value != reference
    }
