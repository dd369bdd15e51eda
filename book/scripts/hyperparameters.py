# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Hyperparameters

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown

from nucseg.records.provenance import provenance_note
from nucseg.records.runs import results_folder, study_runs
from nucseg.records.statistics import bootstrap_mean, summarise, variance_explained
from nucseg.viz import figures

figures.use_style()
FACTORS = ["rank", "alpha", "lr"]
reference = results_folder().parent / "book" / "reference"
theirs = pd.read_csv(reference / "report_code_param_search.csv")
grid = next(iter(study_runs("report-grid").values()), {})  # ours, where it was run
if len(grid) != 36 * 3:  # a grid with holes explains nothing
    grid = {}
ablation = next(iter(study_runs("ablation").values()))
Markdown(provenance_note(runs=[*grid.values(), *ablation.values()]))

# %% [markdown]
# ## Overview
#
# The report tried 36 configurations: rank, alpha and learning rate in a grid. It concludes that rank 8 with
# alpha 8 and a rate of 3e-4 is the best balance, and that a higher rank helps. Its result files are public, so
# the search can be read again, and it can be run again. One of the three knobs does nearly everything, and it is
# not the rank.
#
# ## What you need
#
# The page on LoRA for rank and alpha, the page on fine-tuning for the rest. Nothing is trained on this page.
# It reads the report's own result file and recorded runs: of the study `ablation` for the rank, and of the study
# `report-grid`, the same 36 configurations run again, once it is recorded.

# %% [markdown]
# ## What the report prints, and what its files say
#
# Its Table 4 lists four configurations with a validation Dice each. The result file of the search has all 36.

# %% tags=["hide-input"]
printed = pd.read_csv(reference / "report_tables.csv")
printed = printed[printed["table"] == 4].rename(columns={"dice": "printed"})
printed = printed[[*FACTORS, "printed"]]
theirs["place"] = theirs["val_dice"].rank(ascending=False).astype(int)
table4 = printed.merge(theirs, on=FACTORS)[
    [*FACTORS, "printed", "val_dice", "test_dice", "place"]
]
table4.style.format(
    {"rank": "{:g}", "alpha": "{:g}", "lr": "{:g}", "printed": "{:.4f}", "val_dice": "{:.4f}", "test_dice": "{:.4f}"}
).hide(axis="index").relabel_index(
    ["rank", "alpha", "lr", "printed (val. Dice)", "file: val. Dice", "file: test Dice", "place of 36"],
    axis="columns",
).set_caption("The report's Table 4 beside the result file of its search")  # fmt: skip

# %% tags=["remove-input"]
best = theirs.loc[theirs["val_dice"].idxmax()]
chosen = table4.iloc[0]
agree = int((table4["printed"].round(4) == table4["val_dice"].round(4)).sum())
Markdown(
    f"""Of the four printed values {agree or "none"} equal{"s" if agree < 2 else ""} the file's. The file's best is rank
{best["rank"]:.0f}, alpha {best["alpha"]:.0f}, rate {best["lr"]:g} with a validation Dice of {best["val_dice"]:.4f}; the
configuration that the report recommends is number {chosen["place"]:.0f} of 36."""
)

# %% [markdown]
# ## Which knob matters
#
# In a full grid every combination occurs once, so the variance of the scores splits cleanly: so much for the
# differences between ranks, so much for alphas, so much for rates. The rest is interaction and chance. Each
# share is called eta squared.


# %% tags=["hide-input"]
def configurations(runs):
    """One row a configuration: the mean over its folds, and an interval over the folds' images."""
    rows = []
    for run in runs.values():
        config = run.about["config"]
        one = {name: config[name] for name in FACTORS} | {"fold": config["fold"]}
        val = {"val_dice": run.history["val_dice"].max()}
        rows.append(one | val | {"scores": run.scores})
    found = []
    for values, group in pd.DataFrame(rows).groupby(FACTORS):
        scores = pd.concat(list(group["scores"]))
        row = dict(zip(FACTORS, values, strict=True)) | {"folds": len(group)}
        row["val_dice"] = group["val_dice"].mean()
        for name in ("dice", "aji", "pq"):
            row[name] = scores[name].mean()
            row[f"{name}_low"], row[f"{name}_high"] = bootstrap_mean(scores[name])
        found.append(row)
    return pd.DataFrame(found)


explained = {
    "report, validation Dice": variance_explained(theirs, FACTORS, "val_dice"),
    "report, test Dice": variance_explained(theirs, FACTORS, "test_dice"),
}
if grid:
    ours = configurations(grid)
    explained |= {
        "ours, validation Dice": variance_explained(ours, FACTORS, "val_dice"),
        "ours, test Dice": variance_explained(ours, FACTORS, "dice"),
        "ours, test PQ": variance_explained(ours, FACTORS, "pq"),
    }
    learnt = ours[ours.groupby("lr")["dice"].transform("mean") > 0.1]
    if len(learnt) < len(ours):  # at some rates nothing was learnt
        explained[f"ours, the {len(learnt)} that learnt"] = variance_explained(
            learnt, FACTORS, "dice"
        )
shares = pd.DataFrame(explained).T
shares.style.format("{:.1%}").set_caption(
    "Share of the variance between the 36 configurations that each factor explains; last, in the test Dice, without "
    "those at a rate at which nothing was learnt"
    if grid and len(learnt) < len(ours)
    else "Share of the variance between the 36 configurations that each factor explains"
)

# %% mystnb={"image": {"alt": "Horizontal stacked bars, one for each score of the report and of this book: the learning rate takes most of each bar, alpha a smaller part, rank almost none."}, "figure": {"caption": "Share of variance explained by rank, alpha and learning rate, and what is left over, in the report's search and, where it was run, in ours.", "name": "fig-variance"}} tags=["hide-input"]
figure, ax = plt.subplots(figsize=(figures.WIDTH, 0.9 + 0.38 * len(shares)))
start = np.zeros(len(shares))
for name, colour in zip(shares, [*figures.SERIES[:3], "0.8"], strict=True):
    bars = ax.barh(shares.index, shares[name], left=start, color=colour, label=name)
    for bar, share in zip(bars, shares[name], strict=True):
        if share > 0.06:
            ax.annotate(
                f"{share:.0%}",
                (bar.get_x() + share / 2, bar.get_y() + bar.get_height() / 2),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if name != "rest" else "black",
            )
    start += shares[name].to_numpy()
ax.invert_yaxis()
ax.set(xlim=(0, 1), xlabel="share of the variance")
ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1), frameon=False)
plt.show()

# %% tags=["remove-input"]
their_pairs = theirs.pivot_table(
    index=["rank", "alpha"], columns="lr", values="val_dice"
)
highest = (their_pairs.idxmax(axis=1) == their_pairs.columns.max()).sum()
text = f"""In the report's own numbers the learning rate explains {shares.iloc[0]["lr"]:.0%} of the variance of the validation
Dice, alpha {shares.iloc[0]["alpha"]:.0%}, the rank {shares.iloc[0]["rank"]:.1%}. The largest rate is the best one in
{highest} of {len(their_pairs)} pairs of rank and alpha."""
if grid:
    about = next(iter(grid.values())).about
    config = about["config"]
    pairs = ours.pivot_table(
        index=["rank", "alpha"], columns="lr", values="val_dice"
    )
    top = ours.loc[ours["val_dice"].idxmax()]
    text += f""" In ours it is, too, in {(pairs.idxmax(axis=1) == pairs.columns.max()).sum()} of {len(pairs)}; our best by
validation is rank {top["rank"]:.0f}, alpha {top["alpha"]:g}, rate {top["lr"]:g}.

**Budget of our search.** {len(grid)} runs of {config["epochs"]} epochs on {about["split"]["train"]} windows of
{config["crop"]} px, the encoder at {config["size"]} px, {about["split"]["val"]} validation and {about["split"]["test"]} test
images a fold, three folds, the validation score that of the best epoch, base
`{about["base"]["name"]}`, on {about["device"]}. The report spent far more on each, and short training favours large
rates."""
    if len(learnt) < len(ours):
        failed = sorted(set(ours["lr"]) - set(learnt["lr"]))
        worst = ours[ours["lr"].isin(failed)]["dice"].max()
        rest = shares.iloc[-1]
        text += f""" At {" and ".join(f"{lr:g}" for lr in failed)} it was too short to learn anything (test Dice {worst:.3f} at
most), so the rate's share of our variance says little more than *trained or not*. Without these
{len(ours) - len(learnt)} configurations the rate explains {rest["lr"]:.0%} of the variance of the test Dice, alpha
{rest["alpha"]:.0%}, the rank {rest["rank"]:.1%}."""
else:
    text += """

*Our own run of the grid is not recorded yet: `nucseg reproduce --studies report-grid` runs it, and this page then shows
it beside the report's.*"""
Markdown(text)

# %% [markdown]
# ## The grid itself
#
# LoRA scales its update by alpha over rank. Where anything was learnt the scores rise with alpha, as they do with the rate, and
# hardly change with the rank, although alpha over rank then falls eightfold from rank 2 to rank 16. So it is alpha
# that acts like a second learning rate, not alpha over rank. A likely reason: AdamW moves each entry of $A$ and $B$ by
# about the same step whatever the rank, and their product is a sum over rank-many terms, which makes up for the
# division.

# %% mystnb={"image": {"alt": "Heat maps of validation Dice over the 36 configurations of a search: rows are rank and alpha, columns the learning rate; colours get lighter towards the larger learning rates."}, "figure": {"caption": "Validation Dice of the 36 configurations: the report's result file and, where it was run, our search at its own budget. Each map has its own colour scale.", "name": "fig-grid"}} tags=["hide-input"]
maps = {"the report's": their_pairs} | ({"ours": pairs} if grid else {})
figure, axes = plt.subplots(
    1, len(maps), figsize=(3 * len(maps), 4.2), sharey=True, squeeze=False
)
for ax, (title, values) in zip(axes[0], maps.items(), strict=True):
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
    ax.set(title=title, xlabel="learning rate", ylabel="")
    ax.tick_params(length=0, rotation=0)
plt.show()

# %% tags=["hide-input"]
if grid:
    shown = ours.sort_values("val_dice", ascending=False, ignore_index=True)
    for name in ("dice", "aji", "pq"):
        shown[name] = [
            f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"
            for _, row in shown.iterrows()
        ]
    heads = [*FACTORS, "val. Dice", "test Dice", "test AJI", "test PQ"]
    caption = f"Our {len(ours)} configurations, best validation Dice first; 95% bootstrap intervals over test images"
else:
    shown = theirs.sort_values("val_dice", ascending=False, ignore_index=True)
    heads = [*FACTORS, "val. Dice", "test Dice"]
    caption = "The report's 36 configurations, best validation Dice first"
shown = shown[
    [*FACTORS, "val_dice", *(("dice", "aji", "pq") if grid else ["test_dice"])]
]
shown.style.format(
    {"alpha": "{:g}", "lr": "{:g}", "val_dice": "{:.3f}", "test_dice": "{:.3f}"}
).hide(axis="index").relabel_index(heads, axis="columns").set_caption(caption)

# %% tags=["remove-input"]
if grid:
    best_dozen = ours["dice"].nlargest(12)
    spread = best_dozen.max() - best_dozen.min()
    width = (ours["dice_high"] - ours["dice_low"])[best_dozen.index].median()
    inside = int((ours["dice_high"] >= ours["dice"].max()).sum())
    text = f"""The twelve best test means lie within {spread:.3f}, and their intervals are {width:.3f} wide at the median.
{inside} of the {len(ours)} configurations have an interval that reaches the best test Dice. """
else:
    spread = theirs["test_dice"].max() - theirs["test_dice"].min()
    text = f"""The 36 test means lie within {spread:.3f}, and the files hold no interval for them. """
Markdown(
    text
    + """A search tells good rates from bad ones, and says little about the winners among themselves. Picking the
single best of 36 by a score, and then reporting that score, flatters the method; choose on validation and report on
test, once."""
)

# %% [markdown]
# ## The rank, asked on its own
#
# At another budget, with the head that separates nuclei, only the rank was varied, from none (the head alone
# learns) to all weights free. Alpha equals the rank, so that the scaling stays 1.

# %% tags=["remove-input"]
order = [
    name
    for name in ("rank-0", "lora-4", "lora-8", "lora-16", "full")
    if name in ablation
]
words = {
    "rank-0": "head only",
    "lora-4": "LoRA, rank 4",
    "lora-8": "LoRA, rank 8",
    "lora-16": "LoRA, rank 16",
    "full": "all weights",
}
costs = pd.read_csv(
    results_folder() / "training-cost" / "costs.csv", index_col="variant"
)
rows = []
for name in order:
    run = ablation[name]
    table = summarise(run.scores)
    rows.append(
        {
            "what is trained": words[name],
            "weights": run.about["parameters"]["trainable"],
            "PQ": table.loc["pq", "mean"],
            "low": table.loc["pq", "low"],
            "high": table.loc["pq", "high"],
            "AJI": table.loc["aji", "mean"],
            "Dice": table.loc["dice", "mean"],
            "images a second": costs.loc[name, "images_a_second"],
            "memory (GiB)": costs.loc[name, "peak_memory_mib"] / 1024,
        }
    )
ranks = pd.DataFrame(rows)
ranks.style.format(
    {
        "weights": "{:,.0f}",
        **dict.fromkeys(["PQ", "low", "high", "AJI", "Dice"], "{:.3f}"),
        "images a second": "{:.1f}",
        "memory (GiB)": "{:.1f}",
    }
).hide(axis="index").set_caption(
    "What is trained, on the first fold at equal budget; low and high bound the 95% interval of PQ"
)

# %% [markdown]
# ## Summary
#
# - In a full grid, shares of variance add up, so one table says which knob matters. Here it is the rate.
# - Alpha works like a second learning rate here; dividing it by the rank did not.
# - Print the file, not a copy of it: a program that writes the table cannot mistype it.
# - Choose on validation, report on test once, and give the interval.
#
# ## Further reading
#
# - {cite:t}`hu2021lora`, section 7, on how small a rank can be.

# %% tags=["remove-input"]
Markdown(f"*The rank: {ablation[order[0]].provenance}*")
