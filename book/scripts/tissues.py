# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Tissues

# %% tags=["hide-input"]
from importlib import resources

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown

from nucseg.records.provenance import provenance_note
from nucseg.records.runs import results_folder, study_runs
from nucseg.records.statistics import bootstrap_mean
from nucseg.viz import figures

figures.use_style()
reference = results_folder().parent / "book" / "reference"
columns = study_runs("folds")
column = "mobile_sam-full" if "mobile_sam-full" in columns else next(iter(columns))
runs = list(columns[column].values())
scores = pd.concat([run.scores for run in runs], ignore_index=True)
statistics = pd.read_csv(
    resources.files("nucseg") / "assets" / "nuinsseg_tissue_stats.csv",
    index_col="tissue",
)
Markdown(provenance_note(runs=runs))

# %% [markdown]
# ## Overview
#
# A mean over 31 tissues hides that some are easy and some are nearly hopeless. This page shows all of them, with
# the number of images and an interval for each, asks what makes a tissue hard, and tests models on tissues that were
# left out of their fine-tuning.
#
# ## What you need
#
# The page on cross-validation: the scores are those of its five runs, every image scored once, by the model that
# had not seen it.

# %% [markdown]
# ## The report's five best, and all 31
#
# The report's Table 2 lists five tissues. Each of its rows comes from a single fold, some from two images. Below
# are the same five in the mean over the report's folds, from its result files, and ours.

# %% tags=["hide-input"]
names = {"dice": "Dice", "aji": "AJI", "pq": "PQ"}
printed = pd.read_csv(reference / "report_tables.csv")
printed = printed[printed["table"] == 2].set_index("row").rename_axis("tissue")
raw = pd.read_csv(reference / "report_code_tissue_metrics.csv")
theirs = raw.groupby("tissue").agg(
    images=("n", "mean"),
    dice=("dice", "mean"),
    aji=("aji", "mean"),
    pq=("pq", "mean"),
)
ours = scores.groupby("tissue")[list(names)].mean()
side = pd.concat(
    {
        "printed": printed[list(names)],
        "its files, mean of folds": theirs.loc[printed.index, list(names)],
        "ours": ours.loc[printed.index],
    },
    axis=1,
).rename(columns=names)
side.style.format("{:.3f}").set_caption(
    "The report's Table 2: as printed, as the mean of its five folds, and our five folds"
)


# %% tags=["remove-input"]
def rank_of(tissue, table, key):
    """1 for the tissue with the highest mean."""
    return int(table[key].rank(ascending=False)[tissue])


ranks = [rank_of(tissue, theirs, "dice") for tissue in printed.index]
kidney = [rank_of("human kidney", table, "pq") for table in (theirs, ours)]
alike = [
    table["dice"].corr(table["pq"], method="spearman") for table in (theirs, ours)
]
Markdown(
    f"""In the report's files the five printed tissues rank {", ".join(map(str, ranks[:-1]))} and {ranks[-1]} by their mean Dice,
and the means are over {theirs.loc[printed.index, "images"].min():.0f} to
{theirs.loc[printed.index, "images"].max():.0f} images. Dice alone picks tissues whose foreground is easy: human kidney, number
{rank_of("human kidney", theirs, "dice")} by Dice, is number {kidney[0]} of {len(theirs)} by PQ in the report's files
({theirs.loc["human kidney", "pq"]:.3f}). In ours, where neighbours are parted, it is number {kidney[1]} of {len(ours)}
({ours.loc["human kidney", "pq"]:.3f}). The rank correlation between a tissue's Dice and its PQ is {alike[0]:.2f} in the
report's files and {alike[1]:.2f} in ours."""
)

# %% mystnb={"image": {"alt": "Two ranked dot plots with a line for each of 31 tissues: PQ with its 95 percent interval on the left, AJI on the right, over small grey dots for single images. The best is at the top."}, "figure": {"caption": "Mean PQ and AJI of every tissue, ranked by PQ, with the 95% interval over its images. Grey: single images, whose number is in brackets. Vertical lines: the means over all images.", "name": "fig-tissue-ranking"}} tags=["hide-input"]
ranked = ours.sort_values("pq")
counts = scores["tissue"].value_counts()
figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 6.6), sharey=True)
best_first = ranked.index[::-1]
for ax, name, colour in zip(axes, ("pq", "aji"), figures.SERIES, strict=False):
    rows = {"data": scores, "x": name, "y": "tissue", "order": best_first, "ax": ax}
    sns.stripplot(**rows, color="0.75", size=2, jitter=0.25, zorder=0)
    sns.pointplot(
        **rows,
        color=colour,
        errorbar=bootstrap_mean,
        linestyle="none",
        markersize=4,
        err_kws={"linewidth": 1.4},
    )
    ax.axvline(scores[name].mean(), color="0.6", linewidth=1)
    ax.set(xlabel=names[name], ylabel="", xlim=(0, 0.9))
short = [tissue.replace(" (white and brown)", "") for tissue in best_first]
axes[0].set_yticks(
    range(len(best_first)),
    [f"{s} ({counts[t]})" for s, t in zip(short, best_first, strict=True)],
    fontsize=8,
)
plt.show()

# %% tags=["hide-input"]
table = (
    pd.DataFrame(
        {
            "images": counts,
            "nuclei an image": scores.groupby("tissue")["nuclei_true"].mean(),
            **{names[n]: ours[n] for n in names},
            "PQ, 95%": {
                t: "{:.2f} to {:.2f}".format(*bootstrap_mean(g["pq"]))
                for t, g in scores.groupby("tissue")
            },
        }
    )
    .loc[ranked.index[::-1]]
    .rename_axis("tissue")
    .reset_index()
)
shaded = pd.DataFrame("heat", index=table.index, columns=list(names.values()))
table.style.hide(axis="index").format(
    {"nuclei an image": "{:.0f}", **dict.fromkeys(names.values(), "{:.3f}")}
).background_gradient(
    subset=list(names.values()),
    cmap="cividis",
    low=1.0,
    text_color_threshold=0.0,  # the upper half, on which black can be read
).set_table_styles(
    [{"selector": "td.col6", "props": "white-space: nowrap"}]
).set_td_classes(shaded).set_caption("All tissues, best PQ first; darker is lower")

# %% [markdown]
# ## What makes a tissue hard?
#
# Three properties of a tissue can be measured before any model is trained: how many nuclei an image has, how
# large they are, and what share of them touches another one. A linear fit over the 31 tissues, with each
# property standardised, says how much each score changes with one standard deviation of each.


# %% tags=["hide-input"]
def standardised(values):
    return (values - values.mean()) / values.std()


wanted = {
    "nuclei_per_image_mean": "nuclei an image (log)",
    "area_px_median": "area of a nucleus (log)",
    "touching_fraction": "share that touches",
}
x = statistics.loc[ours.index, list(wanted)].copy()
x[["nuclei_per_image_mean", "area_px_median"]] = np.log(
    x[["nuclei_per_image_mean", "area_px_median"]]
)
x = x.apply(standardised)


def fit(tissues, name):
    design = np.column_stack([np.ones(len(tissues)), x.loc[tissues]])
    return np.linalg.lstsq(design, ours.loc[tissues, name], rcond=None)[0][1:]


rng = np.random.default_rng(0)
fits, clear = {}, {}
for name in names:
    drawn = [fit(rng.choice(ours.index, len(ours)), name) for _ in range(1000)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    clear[names[name]] = (low > 0) | (high < 0)
    fits[names[name]] = [
        f"{b:+.3f} ({lo:+.3f} to {hi:+.3f})".replace("-", "−")
        for b, lo, hi in zip(fit(ours.index, name), low, high, strict=True)
    ]
pd.DataFrame(fits, index=list(wanted.values())).style.set_caption(
    f"Change of a tissue's mean score with one standard deviation of a property; {len(ours)} tissues, 95% bootstrap over tissues"
)

# %% tags=["remove-input"]
both = theirs.index.intersection(ours.index)
touching = statistics["touching_fraction"]
with_touching = [
    table.loc[both, "pq"].corr(touching[both]) for table in (theirs, ours)
]
found = "; ".join(
    f"for {name} {' and '.join(np.array(['the number', 'the area', 'touching'])[which]) or 'none'}"
    for name, which in clear.items()
)
Markdown(
    f"""The properties whose interval is clear of zero are: {found}. The rest may be chance.

What a second map for touching nuclei is worth shows best in the tissues where most of them touch. The correlation of a tissue's
share of touching nuclei with its PQ is {with_touching[0]:+.2f} in the report's files and {with_touching[1]:+.2f} in ours
({len(both)} tissues that both have). Mouse thymus goes from a PQ of {theirs.loc["mouse thymus", "pq"]:.3f} to
{ours.loc["mouse thymus", "pq"]:.3f}, mouse spleen from {theirs.loc["mouse spleen", "pq"]:.3f} to
{ours.loc["mouse spleen", "pq"]:.3f}. The two protocols differ, so only the direction should be read from this.""".replace(
        " -0", " −0"
    )
)

# %% mystnb={"image": {"alt": "Three scatter plots of a tissue's mean PQ: over the nuclei an image, over the median area of a nucleus, and over the share of nuclei that touch another one."}, "figure": {"caption": "Mean PQ of the 31 tissues over three of their properties.", "name": "fig-hard"}} tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 2.5), sharey=True)
for ax, (column_name, label) in zip(axes, wanted.items(), strict=True):
    ax.scatter(
        statistics.loc[ours.index, column_name], ours["pq"], s=14, color="#0072b2"
    )
    label = label.replace(" (log)", "").replace("nucleus", "nucleus, px")
    ax.set_xlabel(label, fontsize=9)
    if "log" in wanted[column_name]:
        ax.set_xscale("log")
        ticks = (10, 30, 100, 300, 600, 1200)
        low, high = ax.get_xlim()
        ax.set_xticks([t for t in ticks if low < t < high], minor=False)
        ax.set_xticks([], minor=True)
        ax.xaxis.set_major_formatter("{x:.0f}")
    for tissue in ours.loc[["mouse thymus"]].index.union(
        [ours["pq"].idxmin(), ours["pq"].idxmax()]
    ):
        at = (statistics.loc[tissue, column_name], ours.loc[tissue, "pq"])
        right = at[0] > np.median(statistics.loc[ours.index, column_name])
        ax.annotate(
            tissue.split(" ", 1)[1],
            at,
            xytext=(-4 if right else 4, 4),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=7,
        )
axes[0].set_ylabel("PQ")
plt.show()

# %% [markdown]
# ## Tissues left out of fine-tuning
#
# In the benchmark's folds every tissue of the test part is in the training part too, very probably from the same slide.
# *Leave one tissue out* trains on 30 tissues and tests on the other one, with the same budget as above. It was done for
# every fifth tissue in alphabetical order. The base `offline` saw no image of them either; but its synthetic tissue
# imitates the number, size and colour of the nuclei of 25 tissues, and these are among them.

# %% tags=["remove-input"]
left_out = study_runs("tissues").get(column, {})
if left_out:
    rows, pairs, trained = [], [], []
    for run in left_out.values():
        tissue = run.scores["tissue"].iloc[0]
        inside = scores[scores["tissue"] == tissue]
        both = run.scores.merge(inside, on=["tissue", "stem"], suffixes=("", "_in"))
        pairs.append(both)
        trained.append(run.about["split"]["train"])
        change = both["pq"] - both["pq_in"]
        low, high = bootstrap_mean(change)
        rows.append(
            {
                "tissue": tissue,
                "images": len(both),
                "PQ, in the folds": both["pq_in"].mean(),
                "PQ, left out": both["pq"].mean(),
                "difference": f"{change.mean():+.3f} ({low:+.3f} to {high:+.3f})".replace(
                    "-", "−"
                ),
            }
        )
    shown = (
        pd.DataFrame(rows)
        .sort_values("tissue")
        .style.hide(axis="index")
        .format({"PQ, in the folds": "{:.3f}", "PQ, left out": "{:.3f}"})
        .set_caption(
            "The same images scored by a model that had seen the tissue, and by one that had not"
        )
    )
else:
    shown = Markdown(
        "*The study `tissues` is not recorded yet: `nucseg reproduce --studies tissues` runs it.*"
    )
shown

# %% tags=["remove-input"]
text = ""
if left_out:
    pairs = pd.concat(pairs)

    def changes(part):
        words = []
        for key, name in {"dice": "Dice", "aji": "AJI", "pq": "PQ"}.items():
            change = part[key] - part[f"{key}_in"]
            low, high = bootstrap_mean(change, part["tissue"])
            words.append(f"{name} {change.mean():+.3f} ({low:+.3f} to {high:+.3f})")
        return ", ".join(words)

    text = f"""Over the {len(pairs)} images of these {pairs["tissue"].nunique()} tissues, leaving the tissue out changes the
scores by: {changes(pairs)}; whole tissues are drawn for the intervals."""
    text += f"""

This is another tissue, stained and scanned in the same laboratory; a slide from elsewhere is not tested here. And it is
understated: the models that had seen the tissue trained on {runs[0].about["split"]["train"]} images, those that had not on
more, because nothing but one tissue was kept from them: {min(trained)} to {max(trained)}."""
    text = text.replace(" -0", " −0").replace("(-0", "(−0")
Markdown(text)

# %% [markdown]
# ## Summary
#
# - Give every tissue with its number of images and an interval; a best five from single folds rests on a few images.
# - Where neighbours stay fused, foreground scores and instance scores rank tissues differently.
# - A mean over folds that share tissues is no promise for a tissue that is new. Measure that on its own.
#
# ## Further reading
#
# - {cite:t}`mahbod2024nuinsseg` describes the tissues and how they were stained and scanned.

# %% tags=["remove-input"]
Markdown(f"*Last fold: {runs[-1].provenance}*")
