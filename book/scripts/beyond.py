# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Beyond the report

# %% tags=["hide-input"]
import inspect
import json
import re

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Markdown

from nucseg.data.synth import generate
from nucseg.instances import components, decode, encode
from nucseg.metrics import score, weighted_mean
from nucseg.records.provenance import provenance_note
from nucseg.records.runs import results_folder, study_runs
from nucseg.records.statistics import bootstrap_mean, difference, summarise
from nucseg.viz import figures

figures.use_style()
columns = study_runs("ablation")
column = "mobile_sam-full" if "mobile_sam-full" in columns else next(iter(columns))
runs = columns[column]
whole = runs["lora-8"]
fresh = runs["fresh-head"]
costs = pd.read_csv(
    results_folder() / "training-cost" / "costs.csv", index_col="variant"
)
cost = json.loads(
    (results_folder() / "training-cost" / "run.json").read_text()
)  # on what that was
Markdown(provenance_note(runs=list(runs.values())))

# %% [markdown]
# ## Overview
#
# The report's design finds nuclei and cannot part them. This page follows the step beyond it: a second map that
# tells touching nuclei apart, and a head that is fine enough to draw it. Then it takes the system to pieces and
# asks of each one what it is worth: the head, its parts, the base, LoRA and its rank.
#
# ## What you need
#
# The pages on LoRA and on fine-tuning. Nothing is trained here: the label maps are made by code, live, and the
# scores are read from the recorded runs of the study `ablation`.

# %% [markdown]
# ## Two maps instead of one
#
# A foreground map says where nuclei are. Two nuclei that touch are one piece of it, and no threshold will part
# them. So the head learns a second map, the *distance map*: how far inside its nucleus a pixel lies, from 0 at the outline
# to 1 from six pixels on. Where two nuclei meet, the distance has a valley. The decoder floods the distance map from its
# peaks and cuts along the valleys.

# %% mystnb={"image": {"alt": "Four panels of crowded synthetic tissue: the image with true outlines; the foreground map, in which neighbours are fused; the distance map, in which a dark line runs between them; and the label map decoded from both, in which they are apart."}, "figure": {"caption": "Crowded synthetic tissue, its two target maps, and the label map that is decoded from them. The scale bar assumes 0.25 µm a pixel.", "name": "fig-two-maps"}} tags=["hide-input"]
sample = generate("human spleen", 6, size=160)
maps = encode(sample.labels)
figure, axes = plt.subplots(2, 2, figsize=(figures.WIDTH, figures.WIDTH))
figures.overlay(sample.image, sample.labels, axes[0, 0])
figures.scale_bar(axes[0, 0])
for ax, one, title in (
    (axes[0, 1], maps[0], "foreground"),
    (axes[1, 0], maps[1], "distance"),
):
    ax.imshow(one, cmap="gray", vmin=0, vmax=1)
    ax.set_title(title)
figures.overlay(sample.image, decode(maps), axes[1, 1])
axes[0, 0].set_title(f"truth: {sample.labels.max()} nuclei")
axes[1, 1].set_title(f"decoded: {decode(maps).max()}")
for ax in axes.flat:
    ax.set_xticks([])
    ax.set_yticks([])
plt.show()

# %% tags=["remove-input"]
fused = components(maps[0])
with_distance, without_distance = (
    score(sample.labels, labels) for labels in (decode(maps), fused)
)
Markdown(
    f"""With a perfect foreground alone, connected pieces give {fused.max()} objects and a PQ of {without_distance.pq:.2f} in this
image. With the distance map it is {with_distance.pq:.2f}."""
)

# %% [markdown]
# ## What the maps can hold
#
# Before anything is trained, one can ask how much is lost by going from a label map to target maps and back, on
# the grid that the head draws on. No network with this head and decoder can be expected to do better.

# %% tags=["remove-input"]
folder = results_folder() / "representations"
strides = pd.read_csv(folder / "strides.csv").set_index("stride")
oracle = pd.read_csv(
    results_folder().parent / "book" / "reference" / "oracle_nuinsseg_fold0.csv"
)
oracle = oracle.set_index("design")
grid = oracle.loc["grid 64 foreground + components"]
fitted = oracle.loc["grid 64 fitted logits + components"]
full = oracle.loc["full-resolution foreground + components"]
Markdown(
    f"""Over all {strides["images"].iloc[0]} label maps of NuInsSeg the round trip, decoded as a network's maps are, keeps an AJI of {strides.loc[2, "aji"]:.3f} and
a PQ of {strides.loc[2, "pq"]:.3f} at every second pixel, and {strides.loc[4, "aji"]:.3f} and {strides.loc[4, "pq"]:.3f} at every
fourth. The report's design, a foreground on a 64 x 64 grid, reaches {grid["aji_kumar"]:.3f} and {grid["pq"]:.3f} on the
first fold with the true foreground averaged onto its grid, and {fitted["aji_kumar"]:.3f} and {fitted["pq"]:.3f} where the
grid's values are fitted to what becomes of them when they are enlarged. A true foreground at full resolution ends at
{full["aji_kumar"]:.3f} and {full["pq"]:.3f}: what touches stays fused."""
)

# %% [markdown]
# Which second map? The candidates were compared on 31 training images, one of each tissue, at every second pixel.
# *Distance* is the one above, reaching 1 after six pixels or as many as the row says; *normalised* divides it by the
# nucleus's own greatest; *boundary* is the outermost two pixels of each nucleus; *hover* are the horizontal and
# vertical distances to the centroid {cite}`graham2019hovernet`. They are decoded by cutting valleys (*ridge*), by a
# level (*threshold*), or as their authors do (*published*). A network's maps are blurred and noisy, so the true ones
# were blurred by a Gaussian of one or two pixels and given noise of a tenth or more of their range.

# %% tags=["hide-input"]
compared = pd.read_csv(folder / "representations.csv")
compared["representation"] = compared["representation"].str.replace(
    "depth", "distance"
)
compared = compared[compared["stride"] == 2]
pivot = compared.pivot_table(index="representation", columns="noise", values="pq")
order = ["none", *sorted(set(pivot.columns) - {"none"})]
pivot[order].sort_values(order[-1], ascending=False).style.format(
    "{:.3f}"
).set_caption(
    "PQ of the round trip for several representations: blur in px, noise as a share of a map's range"
)

# %% [markdown]
# ## What each part is worth
#
# All of the runs below share the fold, the training images, the number of steps and the seed, and differ in one
# thing. The test images are the same, so differences are taken image by image, and the interval is that of the
# paired difference.

# %% tags=["hide-input"]
words = {
    "lora-8": "LoRA, rank 8, instance head",
    "fresh-head": "the head starts from random weights",
    "random": "base random: nothing was pretrained",
    "linear": "the report's linear head",
    "rank-0": "no LoRA: the head alone learns",
    "lora-4": "LoRA, rank 4",
    "lora-16": "LoRA, rank 16",
    "full": "all weights learn, no LoRA",
    "without-distance": "fresh head without the distance map",
    "without-stem": "fresh head without the stem",
    "without-fine": "fresh head without stride-4 features",
    "without-middle": "fresh head without stride-8 features",
}
rows = []
for name in words:
    if name in runs:
        run = runs[name]
        table = summarise(run.scores)
        rows.append(
            {
                "run": words[name],
                "trained weights": run.about["parameters"]["trainable"],
                **{k: table.loc[k, "mean"] for k in ("dice", "aji", "pq")},
                "PQ, 95%": f"{table.loc['pq', 'low']:.3f} to {table.loc['pq', 'high']:.3f}",
                "images a second": costs.loc[name, "images_a_second"],
                "GiB": costs.loc[name, "peak_memory_mib"] / 1024,
            }
        )
table = pd.DataFrame(rows).rename(
    columns={"dice": "Dice", "aji": "AJI", "pq": "PQ"}
)
config = whole.about["config"]
table.style.hide(axis="index").format(
    {
        "trained weights": "{:,}",
        **dict.fromkeys(["Dice", "AJI", "PQ"], "{:.3f}"),
        "images a second": "{:.1f}",
        "GiB": "{:.1f}",
    }
).highlight_max(
    subset=["Dice", "AJI", "PQ"], props="font-weight: bold"
).set_caption(
    f"First fold of NuInsSeg, {config['epochs']} epochs, {len(whole.scores)} test images; the best of each column in bold"
)


# %% mystnb={"image": {"alt": "Forest plot of paired PQ differences with 95 percent intervals: each variant of the system against the whole system, and each piece of the head against the fresh head."}, "figure": {"caption": "What changes in test PQ when one thing is changed, with the 95% interval over images. Blue: against LoRA of rank 8 with the base's head. Orange, where recorded: a piece of the head left out, against the fresh head.", "name": "fig-ablation"}} tags=["hide-input"]
against_name = {False: "LoRA, rank 8", True: "fresh head"}
changes = []
for name in words:
    if name in runs and name != "lora-8":
        piece = name.startswith("without")
        other = fresh if piece else whole
        paired = runs[name].scores.merge(
            other.scores, on=["tissue", "stem"], suffixes=("", "_other")
        )
        change = paired["pq"] - paired["pq_other"]
        labels = {"variant": words[name], "against": against_name[piece]}
        changes.append(pd.DataFrame({"change": change, **labels}))
figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.8))
sns.pointplot(
    pd.concat(changes),
    x="change",
    y="variant",
    hue="against",
    palette=list(figures.SERIES[: len({c["against"].iloc[0] for c in changes})]),
    errorbar=bootstrap_mean,
    linestyle="none",
    markersize=5,
    err_kws={"linewidth": 2},
    ax=ax,
)
ax.axvline(0, color="0.5", linewidth=1, zorder=0)
ax.set(xlabel="change in PQ", ylabel="")
ax.legend(title="compared with", loc="lower left")
plt.show()


# %% tags=["remove-input"]
def change(name, against, what="pq"):
    row = difference(runs[name].scores, against.scores).loc[what]
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})".replace(
        "-", "−"
    )


def pays(
    name,
):  # whether the whole system is better than the variant, beyond chance
    return difference(whole.scores, runs[name].scores).loc["pq", "low"] > 0


total = whole.about["parameters"]["total"]
trained = whole.about["parameters"]["trainable"]
share = runs["lora-8"].scores["pq"].mean() / runs["full"].scores["pq"].mean()
against_whole = {name: change(name, whole) for name in runs}
against_fresh = {name: change(name, fresh) for name in runs}
linear_aji = change("linear", fresh, "aji")
pieces = {
    "distance": "the distance map",
    "stem": "the stem",
    "fine": "stride 4",
    "middle": "stride 8",
}
left_out = [
    f"{words_} by {against_fresh[f'without-{key}']}"
    for key, words_ in pieces.items()
    if f"without-{key}" in runs
]
on_pieces = (
    f" Of its pieces, leaving one out changes PQ: {', '.join(left_out)}."
    if left_out
    else ""
)
slower = costs["seconds_a_step"] / costs.loc["lora-8", "seconds_a_step"]
on_base = (
    "So pretraining pays at this budget."
    if pays("random")
    else "**So this base is not worth its half hour of pretraining here.**"
)
on_lora = (
    "So adapting the encoder pays."
    if pays("rank-0")
    else f"""**So LoRA adds little on this base at this budget, if anything**, in one run of each: at rank 16 PQ is
{change("lora-16", runs["rank-0"])} and Dice {change("lora-16", runs["rank-0"], "dice")} above the head alone; the head does
the work. A base with better features, as MobileSAM's checkpoint should be, may say otherwise."""
)
Markdown(
    f"""**The head.** With the report's linear head PQ changes by {against_fresh["linear"]} against the fresh instance
head, and AJI by {linear_aji}.{on_pieces}

**The base.** Without any pretraining PQ changes by {against_whole["random"]}. The head comes with the base: starting it
from random weights instead changes PQ by {against_whole["fresh-head"]}. What the encoder alone is worth is the random
base against the fresh head on the pretrained encoder, {against_fresh["random"]}. {on_base}

**LoRA.** It trains {trained:,} weights with the head, {trained / total:.1%} of the model, and reaches {share:.0%} of the
PQ of training all of them at the same learning rate, which was not tuned for that. Without LoRA, the head alone, PQ changes by {against_whole["rank-0"]}; with rank 4 by
{against_whole["lora-4"]}, with rank 16 by {against_whole["lora-16"]}. {on_lora} A step takes {slower["full"]:.1f} times
as long when all weights learn, and {slower["rank-0"]:.1f} times when the head alone does. Speed and peak memory in the
table were measured apart from the runs, with nothing else running ({cost["device"]}, {cost["date"][:10]}, commit
{cost["commit"][:7]}, `{cost["command"]}`); ranks differ in them by no more than chance does."""
)

# %% [markdown]
# ## How deep a valley must be
#
# The decoder cuts where the distance between two peaks falls below a share of the lower peak, the *ridge*. The
# valleys of true maps reach nearly to the bottom, so a low ridge parts them and cuts least elsewhere. A network that is not sure draws every valley too shallow, and a ridge that was set on true maps
# then leaves neighbours fused. So it is set on what it will meet: each fold's model, on the validation images of that
# fold, and one value for all five by their mean PQ. Smoothing the distance map by two pixels takes away the peaks that are
# mere noise.

# %% mystnb={"image": {"alt": "Two line charts over the ridge, for the distance map smoothed by two pixels: AJI and PQ on validation images, a thin line for each fold and a thick one for their mean. Both rise to a peak near the dotted line that marks the value in use, and fall steeply after it."}, "figure": {"caption": "Validation scores of the five folds' models over the ridge. Thin: one fold; thick: their mean; dotted: the value that is used.", "name": "fig-ridge"}} tags=["hide-input"]
recorded = results_folder() / "decoding"
decoded = (
    pd.read_csv(recorded / "scores.csv")
    if (recorded / "run.json").exists()
    else None
)
used = inspect.signature(decode).parameters
if decoded is not None:
    swept = decoded[
        (decoded["distance"] == "predicted")
        & (decoded["foreground"] == "predicted")
    ]
    smoothed = swept[swept["smooth_px"] == used["smooth"].default]
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.8), sharex=True)
    for ax, key in zip(axes, ("aji", "pq"), strict=True):
        curve = {"data": smoothed, "x": "ridge", "y": key, "ax": ax}
        curve["color"] = figures.SERIES[0]
        sns.lineplot(
            **curve, units="fold", estimator=None, linewidth=0.7, alpha=0.6
        )
        sns.lineplot(**curve, errorbar=None, linewidth=2, marker="o")
        ax.axvline(used["ridge"].default, color="0.5", linestyle=":")
        ax.set(xlabel="ridge", ylabel=f"validation {key.upper()}")
    plt.show()

# %% tags=["remove-input"]
text = "*`experiments/decoding.py` has not been run here.*"
if decoded is not None:
    about = json.loads((recorded / "run.json").read_text())
    mean = swept.groupby(["smooth_px", "ridge"])[["aji", "pq"]].mean()
    now = mean.loc[(used["smooth"].default, used["ridge"].default)]
    plain = mean.loc[(0.0, used["ridge"].default)]
    setting = compared.loc[
        compared["representation"] == "distance, ridge", "setting"
    ]
    on_truth = float(re.search(r"ridge=([\d.]+)", setting.iloc[0])[1])
    before = mean.loc[(0.0, on_truth)]
    best = smoothed.loc[smoothed.groupby("fold")["pq"].idxmax(), "ridge"]
    finest = mean["pq"].idxmax()
    gain = (
        smoothed.groupby("fold")["pq"].max().mean()
        - smoothed[smoothed["ridge"] == used["ridge"].default]["pq"].mean()
    )
    with_true = {
        key: decoded[decoded[key] == "true"][["dice", "aji", "pq"]].mean()
        for key in ("distance", "foreground")
    }
    weaker = max(with_true, key=lambda key: with_true[key]["pq"])
    text = f"""With a ridge of {on_truth:g}, the best on true maps with noise, AJI is {before["aji"]:.3f} and PQ {before["pq"]:.3f} on
validation images; with {used["ridge"].default:g} they are {plain["aji"]:.3f} and {plain["pq"]:.3f}, and smoothed
{now["aji"]:.3f} and {now["pq"]:.3f}. Taken alone, the folds would choose {best.min():g} to {best.max():g}, and gain
{gain:.4f} in PQ on the average. The best of all settings that were tried, {finest[0]:g} px and {finest[1]:g}, has a PQ of
{mean["pq"].max():.3f}.

**What is still lost, and where.** Give the decoder the true distance map and leave it the predicted foreground, and PQ is
{with_true["distance"]["pq"]:.3f} and AJI {with_true["distance"]["aji"]:.3f}. Give it the true foreground and the predicted
distance map, and they are {with_true["foreground"]["pq"]:.3f} and {with_true["foreground"]["aji"]:.3f}. So the {weaker} map loses
more: there a longer run or a better base has the most to win, and no setting of a decoder will stand in for it. ({about["data"]["images"]} validation images, {about["device"]},
{about["date"][:10]}, commit {about["commit"][:7]}.)"""
Markdown(text)

# %% [markdown]
# ## Corrected evaluation
#
# [NucEval](https://arxiv.org/abs/2605.03144) proposes four corrections of how nuclei are scored. Nuclei in areas that the annotators
# called vague are left out. A zone along the outlines, where no two people agree, is left out. Images count by their
# nuclei. And where nuclei overlap, the truth is a stack of masks, not a label map. The first three are in
# `nucseg.metrics`; the vague areas only where a copy of the data has them; the fourth needs outlines that the label maps do not hold. Here they raise the scores without
# any change of the method, so they stand beside the usual ones, never in their place.

# %% tags=["hide-input"]
recorded = results_folder() / "corrections"
shown = Markdown("*`experiments/corrections.py` has not been run here.*")
if (recorded / "run.json").exists():
    corrected = json.loads((recorded / "run.json").read_text())
    ways = pd.read_csv(recorded / "scores.csv")
    metrics = {"dice": "Dice", "aji": "AJI", "pq": "PQ"}
    table = ways.groupby("way", sort=False)[list(metrics)].mean()
    most = ways[ways["way"] == table.index[-1]]
    table.loc[f"{table.index[-1]}, images weighted by their nuclei"] = [
        weighted_mean(most[key], most["nuclei_true"]) for key in metrics
    ]
    gain = table["pq"] - table.loc["as the benchmark", "pq"]
    shown = (
        table.rename(columns=metrics)
        .assign(**{"change of PQ": gain.map("{:+.3f}".format)})
        .style.format(dict.fromkeys(metrics.values(), "{:.3f}"))
        .set_caption(
            f"The five folds' predictions on {ways.groupby(['tissue', 'stem']).ngroups} images, scored in "
            f"other ways; the zone is {corrected['border_px']} px on either side of an outline ({corrected['date'][:10]}, commit "
            f"{corrected['commit'][:7]}, {corrected['device']})"
        )
    )
shown

# %% [markdown]
# ## What is next
#
# - **A longer run.** `nucseg reproduce` trains the same studies in full on a GPU, and from MobileSAM's own
#   checkpoint where it has been fetched. This page then shows that column.
# - **Tissues that nothing has seen.** The seven tissues of {doc}`tissues` are imitated by the base's synthetic tissue. The
#   six that are not are the harder test, and a slide of another laboratory the hardest.
#
# ## Summary
#
# - A second map, the distance map, lets a decoder cut between nuclei that touch.
# - Check the ceiling of a design before training it: encode and decode the truth.
# - Change one thing at a time, on the same images, and give the interval of the paired difference.
#
# ## Further reading
#
# - {cite:t}`graham2019hovernet`, whose two distance maps are the best known way to part nuclei.
# - {cite:t}`mahbod2024nuinsseg` for the benchmark.

# %% tags=["remove-input"]
Markdown(f"*The whole system: {whole.provenance}*")
