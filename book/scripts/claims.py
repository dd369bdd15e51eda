# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # What holds

# %% tags=["hide-input"]
import copy
import os
import random
import re
import time
from importlib.resources import files
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from scipy import ndimage
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from nucseg.config import ModelConfig
from nucseg.data import datasets, splits
from nucseg.data.synth import Synthetic
from nucseg.errors import InputError
from nucseg.instances import components, decode, encode, foreground
from nucseg.metrics import score
from nucseg.model import lora
from nucseg.model.bases import load_base
from nucseg.model.network import build_model, parameter_ledger
from nucseg.model.sam import PIXEL_MEAN, PIXEL_STD, build_sam
from nucseg.records.provenance import provenance_note
from nucseg.records.runs import read_run, results_folder
from nucseg.records.statistics import variance_explained
from nucseg.viz import figures

started = time.monotonic()
torch.manual_seed(0)
figures.use_style()

try:
    results = results_folder()
except InputError as error:  # an installed package without the repository
    raise SystemExit(str(error)) from None
reference = results.parent / "book" / "reference"
ledger = pd.read_csv(reference / "claims.csv", index_col="number")
found = ledger["evidence"]

root = os.environ.get("NUCSEG_DATA")
if root:  # NuInsSeg itself: the test images of the benchmark's first fold
    dataset = datasets.NuInsSeg(root)
    shown = splits.folds(dataset)[0].test
else:
    dataset = Synthetic(n_per_tissue=1, seed=0)
    shown = range(len(dataset))

base = load_base("random", seed=0)
reported = ModelConfig(
    base="random", size=128, rank=4, alpha=4, dropout=0.0, unused_head=True
)
model = build_model(reported, base)
Markdown(provenance_note(dataset, model))

# %% [markdown]
# ## Overview
#
# This page goes through what the report says, claim by claim, and recomputes what can be recomputed. A report
# can only be read this closely because its author published the code and the result files as well. The
# result in short:


# %% tags=["remove-input"]
def said(number):
    """What the ledger says about a claim, as a sentence."""
    return f"{found[number][0].upper()}{found[number][1:]}."


Markdown(
    f"""- **Much holds.** The formula, the head, the losses and the optimiser are as described. Table 1 agrees with the
  recorded results, a larger alpha helps, and touching nuclei are merged, just as the report says.
- **The count of weights** is exact for rank 4. The reported model has rank 8. {said(3)}
- **The test images** are mostly not new to the model. {said(15)}
- **The AJI** is more lenient than the published one. {said(19)}
- **The images** meet the network in a form that it was not trained on. {said(9)}
- **The search** points to another configuration, and shows that the rank hardly matters. {said(30)}
- **The comparison** changes when the scores are those that the data set's authors published. {said(26)}

[The ledger](#claims-ledger) at the end lists all {len(ledger)} claims. None of this makes the report less worth reading:
its system is simple, its numbers are stated, and most slips have a remedy of a few lines."""
)

# %% [markdown]
# ## What you need
#
# The pages on [the data](data.ipynb) and on [LoRA](lora.ipynb). Nothing is downloaded and nothing is trained.
# Some numbers follow from arithmetic or from the architecture of MobileSAM, for which random weights serve.
# Some follow from the names of NuInsSeg's images, which come with the package. Where images are needed, they are
# synthetic, or the test images of the benchmark's first fold where `NUCSEG_DATA` names the folder of NuInsSeg.
#
# The folder `book/reference` holds what others measured, and the report's own tables. It also holds the ledger
# that closes this page. Each section compares its results with the ledger's wording, through the function below.
# If one of them differs, the page does not build.


# %% tags=["hide-input"]
agreed = {number: [] for number in ledger.index}


def whole(phrase):
    """A pattern for the phrase that does not match inside a longer number."""
    return rf"(?<![\d.,]){re.escape(phrase)}(?![\d%])"


def agree(number, *phrases):
    """Hold the ledger's evidence for a claim against numbers that were just computed."""
    for phrase in phrases:
        assert re.search(whole(phrase), found[number]), (number, phrase)
    agreed[number] += phrases


tables = pd.read_csv(reference / "report_tables.csv")


def printed(number):
    """A table as the report prints it."""
    return (
        tables[tables["table"] == number]
        .drop(columns="table")
        .dropna(axis="columns")
    )


# %% [markdown]
# (claims-weights)=
# ## How many weights are trained
#
# The report trains 124,321 of 10,254,413 weights, and says that LoRA of rank 8 sits on the attention. LoRA of
# rank $r$ on a layer from $d_{in}$ to $d_{out}$ numbers adds $r (d_{in} + d_{out})$ weights. So the count can be
# had from the shapes of the layers alone:

# %%
kinds = {
    "attention, qkv": "attn.qkv",
    "attention, proj": "attn.proj",
    "MLP, fc1": "mlp.fc1",
    "MLP, fc2": "mlp.fc2",
    "classifier": "head",
}
layers = lora.lora_layers(model.encoder)
shapes = {
    kind: [layer.linear for name, layer in layers.items() if name.endswith(end)]
    for kind, end in kinds.items()
}
sides = {
    kind: sum(m.in_features + m.out_features for m in linears)
    for kind, linears in shapes.items()
}
counts = pd.DataFrame({r: {k: r * s for k, s in sides.items()} for r in (4, 8, 16)})
counts.loc["LoRA, together"] = counts.sum()
counts.loc["head"] = sum(p.numel() for p in model.head.parameters())
counts.loc["trained"] = counts.loc[["LoRA, together", "head"]].sum()
counts.rename(columns="rank {}".format).style.format("{:,}").highlight_between(
    left=124_321,
    right=124_321,
    props="font-weight: bold; text-decoration: underline",
)

# %% tags=["remove-input"]
measured = parameter_ledger(model)  # counted in the model itself, at rank 4
assert measured["lora"] == counts.loc["LoRA, together", 4]
assert measured["trainable"] == counts.loc["trained", 4] == 124_321
assert measured["total"] == 10_254_413
assert f"{measured['trainable']:,}" in ledger.loc[2, "claim"]
assert f"{measured['total']:,}" in ledger.loc[1, "claim"]
number_of_layers = sum(len(linears) for linears in shapes.values())
assert number_of_layers == len(layers)
trained = counts.loc["trained"]
total = measured["base"] + trained
in_attention = counts.loc[["attention, qkv", "attention, proj"], 4].sum()
share_attention = in_attention / measured["lora"]
share_idle = counts.loc["classifier", 4] / measured["lora"]
sam = build_sam()
never_run = sum(
    p.numel()
    for m in (
        sam.prompt_encoder,
        sam.mask_decoder,
        sam.image_encoder.head,
        sam.image_encoder.norm_head,
    )
    for p in m.parameters()
)
stride = 16
grid = 1024 // stride
logits = model.head([torch.zeros(1, 256, grid, grid)])
assert logits.shape == (1, 1, grid, grid)
agree(1, "rank 4", "rank 8", f"{total[8]:,}", f"{never_run:,}")
assert f"{trained[4] / total[4]:.2%}" in ledger.loc[2, "claim"]
agree(2, "rank 4", f"{number_of_layers} Linear layers")
agree(2, f"{measured['lora']:,}", f"{measured['head']}")
agree(3, f"{trained[8]:,} of {total[8]:,}", f"{trained[8] / total[8]:.2%}")
agree(4, f"{number_of_layers} Linear layers")
agree(4, f"{share_attention:.1%}", f"{share_idle:.1%}")
agree(8, f"{measured['head']} weights", f"{grid} × {grid}", "1024 px")
Markdown(
    f"""The count is exact, which is more than many papers can say. It belongs to rank 4, the default of the code, with
LoRA on all {number_of_layers} linear layers of the encoder. The model that the report settles on has rank 8. It
trains {trained[8]:,} of {total[8]:,} weights, {trained[8] / total[8]:.2%} instead of {trained[4] / total[4]:.2%}:
still few.

Of the LoRA weights, {share_attention:.1%} are in the attention, and most of the others in the MLP blocks. That
is a sensible choice, only another one than the text describes. It matters because the report explains its
success by the attention. And {share_idle:.1%} of them belong to a classifier that MobileSAM keeps but never
calls. A backward pass finds such weights: they get no gradient at all."""
)

# %%
sample = dataset[shown[0]]
crop = torch.from_numpy(sample.image[:128, :128]).permute(2, 0, 1)[None]
model.train()(crop).mean().backward()
idle = [name for name, layer in layers.items() if layer.lora_B.grad is None]
model.zero_grad(set_to_none=True)
model.eval()
idle

# %% tags=["remove-input"]
assert idle == ["head"]
Markdown(
    f"""Every other LoRA layer gets one. At rank 8 the idle weights are {counts.loc["classifier", 8]:,}.

**To do it right:** count the parameters of the very model that was scored, in the script that scores it, and
write the count into its result file. The page on [LoRA](lora.ipynb) counts every placement."""
)

# %% [markdown]
# (claims-normalised)=
# ## Normalised twice
#
# A network expects its input on the scale it was trained with. SAM subtracts a mean from each channel and
# divides by a standard deviation, on the scale 0 to 255. The report's data loader does the same on the scale 0
# to 1, with the usual ImageNet numbers. After that, SAM's own step is applied to the result:

# %%
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
once = (sample.image / 255 - IMAGENET_MEAN) / IMAGENET_STD  # the data loader
twice = (once - PIXEL_MEAN) / PIXEL_STD  # then SAM's own step
assert np.allclose(
    once, (sample.image - PIXEL_MEAN) / PIXEL_STD
)  # they are the same
spread = pd.DataFrame(
    {"once": once.std(axis=(0, 1)), "twice": twice.std(axis=(0, 1))},
    index=["red", "green", "blue"],
)
spread["ratio"] = spread["once"] / spread["twice"]
spread.style.format("{:.3f}").format("{:.1f}", subset="ratio")

# %% mystnb={"figure": {"caption": "The green channel of one image as the encoder receives it, on the same scale from black to white.", "name": "fig-claims-normalised"}, "image": {"alt": "Two panels. Normalised once, the tissue and its dark nuclei are plain to see. Normalised twice, the panel is one even dark grey."}} tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.9))
for ax, pixels, title in zip(
    axes, (once, twice), ("normalised once", "normalised twice"), strict=True
):
    shade = ax.imshow(pixels[..., 1], cmap="gray", vmin=-2.5, vmax=2.5)
    ax.set_title(title)
    ax.axis("off")
figure.colorbar(shade, ax=axes, shrink=0.8, label="input of the encoder")
plt.show()

# %% tags=["remove-input"]
agree(9, f"{spread['ratio'].min():.0f} to {spread['ratio'].max():.0f}")
Markdown(
    f"""A standard deviation measures contrast. Normalised twice, it is divided by
{spread["ratio"].min():.0f} to {spread["ratio"].max():.0f}, and the mean is far from zero. The image is not lost, since floating-point
numbers keep it, and BatchNorm layers in training mode rescale what passes through them. But the frozen
weights meet an input that they were never trained on, which may cost some of what the pretraining brought. Such
an error is hard to notice, because nothing crashes and the model still learns.

**To do it right:** let one place own the normalisation. The model of `nucseg` takes whole numbers from 0 to 255 and
refuses anything else:"""
)

# %%
try:
    model(torch.from_numpy(once[:128, :128]).float().permute(2, 0, 1)[None])
except InputError as refusal:
    print(refusal)

# %% [markdown]
# (claims-folds)=
# ## Which images test the model
#
# In cross-validation every image is tested once, by a model that has not seen it. The report's code draws
# its folds with a seed, so they can be drawn again. Its `KFold` runs over the first 70% of the list of files.
# Its test set is the last fifth of a separate shuffle of *all* files, the same for each fold.

# %%
listing = datasets.nuinsseg_list()
names = SimpleNamespace(table=listing)  # a data set's names are enough
order = list(range(len(listing)))
random.Random(42).shuffle(order)
tested = set(order[int(0.7 * len(order)) + int(0.1 * len(order)) :])


def overlap(folds):
    """How many test images lie in which part of each fold."""
    rows = []
    for split in splits.report_folds(names, folds):
        train, val = set(split.train), set(split.val)
        rows.append(
            {
                "training images": len(train),
                "tested": len(tested),
                "in training": len(tested & train),
                "in validation": len(tested & val),
                "in neither": len(tested - train - val),
            }
        )
    return pd.DataFrame(rows, index=[f"fold {k + 1}" for k in range(folds)])


five = overlap(5)
five.drop(columns=["training images", "tested"]).style

# %% tags=["remove-input"]
recorded = pd.read_csv(reference / "report_code_split_overlap.csv")
columns = ["n_train", "n_test", "test_in_train", "test_in_val", "test_in_neither"]
for folds in (5, 3):
    same = recorded[
        (recorded["folds"] == folds)
        & recorded["test_set"].str.startswith("evaluate")
    ]
    assert (overlap(folds).to_numpy() == same[columns].to_numpy()).all()
tissues = pd.read_csv(reference / "report_code_tissue_metrics.csv")
by_tissue = listing.loc[sorted(tested), "tissue"].value_counts()
for _, group in tissues.groupby("fold"):  # the report's results: the same images
    assert group.set_index("tissue")["n"].to_dict() == by_tissue.to_dict()

first = splits.report_folds(names)[0]
used = set(first.train) | set(first.val)
unused = listing[~listing.index.isin(used)]
mouse = unused["tissue"].str.startswith("mouse").sum()
cord = (unused["tissue"] == "human umbilical cord").sum()
assert mouse + cord == len(unused)
agree(14, f"{len(used)} of {len(listing)} images", f"{len(unused)}")
agree(14, f"{mouse} of mouse", f"{cord} of umbilical cord")


def plain(tissue):
    return tissue.replace("_", " ")


def between(column):
    shares = five[column] / five["tested"]
    return f"{shares.min():.1%} to {shares.max():.1%}"


agree(15, f"{len(tested)} test images", between("in training"))
agree(15, between("in validation"))
(known,) = set((five["in training"] + five["in validation"]) / five["tested"])
Markdown(
    f"""All five models are scored on the same {len(tested)} images. These are the counts that the report's own code gave
when it was run on the list (`report_code_split_overlap.csv`), and its results by tissue have the same number of images
of each tissue. So {between("in training")} of the test images were in a model's training part, and
{between("in validation")} in the part that chose its checkpoint. Each model knew {known:.0%} of them.

The list is sorted, so its first 70% are the tissues whose names come first. The other {len(unused)} images are in no fold:
{", ".join(f"{n} of {plain(t)}" for t, n in unused["tissue"].value_counts().items())}. They are nearly all of mouse."""
)

# %% tags=["remove-input"]
species = tissues["tissue"].str.split().str[0]
dice_of = {
    name: np.average(group["dice"], weights=group["n"])
    for name, group in tissues.groupby(species)
}
of_species = listing.loc[sorted(tested)]["tissue"].str.startswith("human")
new = listing.loc[sorted(tested - used)]["tissue"].str.startswith("human")
assert (~new).sum() == (~of_species).sum()  # all of mouse
benchmark = splits.folds(names)
assert not any(set(s.test) & (set(s.train) | set(s.val)) for s in benchmark)
assert sorted(i for s in benchmark for i in s.test) == list(range(len(listing)))
Markdown(
    f"""This leaves a trace in the report's own results. Of the {of_species.sum()} human test images, {new.sum()} were
new to the models, and the mean Dice is {dice_of["human"]:.3f}. Of the {(~of_species).sum()} mouse images all were new, and
it is {dice_of["mouse"]:.3f}. The two groups differ in species as well, so the gap does not measure the leak. But only the
second number is about images that the model had never seen.

**To do it right:** draw the folds over all images and test each image once, as the benchmark does, with a validation
part that is held out of the training folds. `nucseg.data.splits.folds` does that, and no image is in two of its parts. The page on
[the data](data.ipynb) explains why the list of files belongs to the protocol."""
)

# %% [markdown]
# (claims-aji)=
# ## An AJI that forgives missed nuclei
#
# The aggregated Jaccard index {cite}`kumar2017aji` adds up the intersections of matched nuclei and divides by
# the unions. Whatever has no match adds its area to the denominator: a prediction without a nucleus, and a
# nucleus without a prediction. The report's code does the first, not the second. It also matches one to one,
# as AJI+ does {cite}`graham2019hovernet`.
#
# To see what this does, take a perfect prediction and delete some of its nuclei, chosen at random:

# %%
samples = [dataset[i] for i in shown]
SHARES = (0, 0.1, 0.2, 0.3, 0.4, 0.5)


def without(labels, share, seed):
    """The label map without a share of its nuclei."""
    count = labels.max()
    gone = np.random.default_rng(seed).permutation(count)[: round(share * count)]
    return np.where(np.isin(labels, gone + 1), 0, labels)


dropped = pd.DataFrame(
    [
        {"share": share, "report": s.aji_matched_only, "Kumar": s.aji, "PQ": s.pq}
        for share in SHARES
        for i, sample in enumerate(samples)
        for s in [score(sample.labels, without(sample.labels, share, seed=i))]
    ]
)
dropped = dropped.groupby("share").mean()
dropped.rename(index="{:.0%}".format).rename_axis(None).style.format("{:.3f}")

# %% mystnb={"figure": {"caption": "A perfect prediction from which nuclei are deleted: the report's AJI does not notice.", "name": "fig-claims-aji"}, "image": {"alt": "Line chart. Horizontal axis: share of nuclei deleted, from 0 to 50%. The report's AJI stays at one; Kumar's AJI falls steadily to about one half."}} tags=["hide-input"]
figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.8))
for column, words, colour, style in (
    ("report", "as the report computes it", figures.SERIES[1], "--"),
    ("Kumar", "as Kumar et al. define it", figures.SERIES[0], "-"),
):
    ax.plot(dropped[column], style, color=colour, marker="o", markersize=4)
    ax.annotate(
        words,
        (0.5, dropped.loc[0.5, column]),
        xytext=(0, -16 if column == "report" else 26),
        textcoords="offset points",
        ha="right",
        color=colour,
    )
ax.set(xlabel="share of the nuclei deleted", ylabel="AJI", ylim=(0, 1.06))
ax.xaxis.set_major_formatter("{x:.0%}")
plt.show()

# %% tags=["remove-input"]
at_20 = dropped.loc[0.2]
agree(19, "20%", f"{at_20['report']:.2f}", f"{at_20['Kumar']:.1f}")
run = read_run(results / "report" / "fold1-random-cpu")
lenient, strict = run.scores["aji_matched_only"].mean(), run.scores["aji"].mean()
table_1 = printed(1).set_index("row")
estimate = table_1.loc["average", "aji"] * strict / lenient
Markdown(
    f"""Without {0.2:.0%} of its nuclei, the prediction still scores {at_20["report"]:.2f}; Kumar's AJI says {at_20["Kumar"]:.2f}.
Missed nuclei are a common error, so the difference is not small in practice. The recorded run of
the report's design on the page on [fine-tuning](finetuning.ipynb) was scored both ways on {len(run.scores)} real images:
{lenient:.3f} with the report's formula, {strict:.3f} with Kumar's. If Table 1 shrank by the same factor, its AJI of
{table_1.loc["average", "aji"]:.4f} would be about {estimate:.2f}. That is an estimate; only the predictions themselves
could tell.

**To do it right:** test a metric on cases whose score is known, such as this one, before it is used.
`nucseg.metrics` has both versions, so that scores of either kind can be compared with their own kind."""
)

# %% [markdown]
# (claims-bounds)=
# ## Bounds that scores must keep
#
# Some scores are tied to each other. For one image Dice $D$ and IoU $I$ say the same thing, $D = 2I / (1 + I)$.
# This curve bends downwards, so for means over the same images
#
# $$
# \bar D \le \frac{2 \bar I}{1 + \bar I}
# $$
#
# and a mean Dice above this bound cannot be right. Here are the pairs that the report prints:

# %% tags=["hide-input"]
pairs = pd.concat([table_1.loc[["average"]], printed(3).set_index("row")])
pairs = pairs[["dice", "iou"]].rename(index={"average": "Table 1"})
pairs = pairs.drop(index="MobileSAM + LoRA")  # the same as Table 1
pairs["bound"] = 2 * pairs["iou"] / (1 + pairs["iou"])
pairs["kept"] = (pairs["dice"] <= pairs["bound"]).map({True: "yes", False: "no"})
pairs.columns = ["Dice", "IoU", "bound", "kept"]
pairs.rename_axis(None).style.format("{:.3f}", subset=["Dice", "IoU", "bound"])

# %% tags=["remove-input"]
folds_1 = table_1.drop(index="average")
assert (folds_1["dice"] <= 2 * folds_1["iou"] / (1 + folds_1["iou"])).all()
others = pairs.drop(index="Table 1")
assert (others["kept"] == "no").all() and pairs["kept"].iloc[0] == "yes"
half = 0.005  # rounding to two digits
highest = 2 * (others["IoU"] + half) / (1 + others["IoU"] + half)
assert (highest < others["Dice"] - half).all()
average = table_1.loc["average"]
assert (folds_1.mean().round(4) == average).all()
product = average["sq"] * average["rq"]
assert product < average["pq"]
a, b, c = (f"{value:.2f}" for value in others["IoU"])
agree(25, f"{a}, {b} and {c}")
a, b, c = (f"{value:.3f}" for value in others["bound"])
agree(25, f"{a}, {b} and {c}")
agree(41, f"{average['sq']:.4f} × {average['rq']:.4f} = {product:.4f}")
agree(41, f"{average['pq']:.4f}")
agree(42, f"{average['iou']:.4f}", f"{pairs['bound'].iloc[0]:.4f}")
Markdown(
    f"""The report's own results pass, fold by fold, and the averages of Table 1 are the means of its rows. Its PQ is not
the product of SQ and RQ, {average["pq"]:.4f} against {product:.4f}, and that is as it should be: PQ is averaged over
images, and a mean of products is not a product of means. The three baselines of Table 3 cannot be right, even if each
number was rounded to two digits. So they were not measured together, wherever they came from."""
)

# %% [markdown]
# A second tie: an image's AJI is never above the IoU of its foreground. The intersections of AJI lie in the
# common foreground, so they cannot add up to more than it; its unions, with what was missed and what is
# spurious, cover all of the foreground, so they cannot add up to less. Means keep the order. The report's code
# wrote down both scores for each tissue and fold:

# %% mystnb={"figure": {"caption": "AJI and IoU from the report's result files, one dot for each tissue and fold. Kumar's AJI cannot lie above the line.", "name": "fig-claims-bounds"}, "image": {"alt": "Scatter plot of AJI over IoU with the diagonal. Most grey dots lie below it; about two dozen red triangles lie above it, all at an IoU below 0.7."}} tags=["hide-input"]
impossible = tissues["aji"] > tissues["iou"]
figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.6))
ax.plot([0, 1], [0, 1], color="0.5", linewidth=1, zorder=0)
for which, words, at, colour, marker in (
    (~impossible, "possible", (0.56, 0.25), "#6e6e6e", "o"),
    (impossible, "impossible", (0.5, 0.72), figures.SERIES[1], "^"),
):
    dots = tissues[which]
    ax.scatter(dots["iou"], dots["aji"], s=18, color=colour, marker=marker)
    ax.text(*at, f"{words}: {len(dots)}", color=colour)
ax.set(xlabel="IoU", ylabel="AJI, the report's", xlim=(0.35, 0.9), ylim=(0, 0.9))
plt.show()

# %% tags=["remove-input"]
which = tissues[impossible]["tissue"].value_counts()
agree(43, f"{impossible.sum()} of {len(tissues)}")
Markdown(
    f"""{impossible.sum()} of {len(tissues)} results lie above the line: {", ".join(f"{plain(t)} ({n})" for t, n in which.items())}, in
brackets the folds out of {tissues["fold"].nunique()}. They show the lenient AJI at work: missed nuclei lower the IoU, and not this AJI.

**To do it right:** assert such ties where scores are made. They cost nothing, and they find errors in other people's
numbers too."""
)

# %% [markdown]
# (claims-ceiling)=
# ## What the design can reach
#
# The report's model draws one foreground map, 64 × 64 for an image of 1024 px, and takes each connected piece of
# it for a nucleus. How well could it do if the network never erred? We give it the true foreground and let the
# rest of the design work: once at full resolution, once through the coarse grid. Beside it stands the way of
# `nucseg`, which learns a second map, the distance to the outline of each nucleus, and cuts along its valleys; its maps
# go through a grid of every second pixel.


# %%
def through_grid(maps, step):
    """What is left of maps that a network gives on every step-th pixel."""
    coarse = F.avg_pool2d(torch.from_numpy(maps)[None], step)
    back = F.interpolate(
        coarse, scale_factor=step, mode="bilinear", align_corners=False
    )
    return back[0].numpy()


def coarse_components(labels):
    step = labels.shape[0] // 64
    return components(through_grid(foreground(labels), step)[0])


def fine_components(labels):
    return components(foreground(labels)[0])


def decoded_from_two_maps(labels):
    return decode(through_grid(encode(labels), 2))


designs = {
    "full size": fine_components,
    "64 × 64 grid": coarse_components,
    "with distance map": decoded_from_two_maps,
}
made = {
    name: [design(s.labels) for s in samples] for name, design in designs.items()
}
ceiling = pd.DataFrame(
    {
        name: pd.DataFrame(
            [vars(score(s.labels, m)) for s, m in zip(samples, maps, strict=True)]
        ).mean()
        for name, maps in made.items()
    }
).T

# %% tags=["hide-input"]
oracle = pd.read_csv(reference / "oracle_nuinsseg_fold0.csv", index_col="design")
oracle = oracle.rename(columns={"aji_kumar": "aji"})
trips = pd.read_csv(results / "representations" / "roundtrip_images.csv")
first_fold = set(listing.loc[list(benchmark[0].test), "stem"])
trips = trips[(trips["stride"] == 2) & trips["stem"].isin(first_fold)]
assert len(trips) == len(first_fold) == oracle["n_images"].iloc[0]
on_real = pd.DataFrame(
    {
        "full size": oracle.loc[
            "full-resolution foreground + components", ["aji", "pq"]
        ],
        "64 × 64 grid": oracle.loc[
            "grid 64 foreground + components", ["aji", "pq"]
        ],
        "with distance map": trips[["aji", "pq"]].mean(),
    }
).T.astype(float)
both = pd.concat({"here": ceiling[["aji", "pq"]], "NuInsSeg": on_real}, axis=1)
both.rename(columns=str.upper, level=1).style.format("{:.3f}")

# %% mystnb={"figure": {"caption": "Two nuclei that touch: the truth, and what two designs make of it when their networks are perfect. The number counts the objects.", "name": "fig-claims-merged"}, "image": {"alt": "Three crops of the same two touching nuclei. In the truth each has an outline of its own. Connected components on the coarse grid draw one outline around both. With the distance map there are two outlines again."}} tags=["hide-input"]


def touching_pairs(labels, margin=24):
    """(size of the smaller nucleus, piece, window) of connected pieces of just two nuclei inside the image."""
    pieces = components(foreground(labels)[0])
    for number, slices in enumerate(ndimage.find_objects(pieces), start=1):
        piece = pieces == number
        sizes = np.unique(labels[piece], return_counts=True)[1]
        window = tuple(slice(s.start - margin, s.stop + margin) for s in slices)
        inside = all(
            s.start >= 0 and s.stop <= side
            for s, side in zip(window, labels.shape, strict=True)
        )
        if len(sizes) == 2 and inside:
            yield int(sizes.min()), piece, window


def objects_of(labels, piece):
    """The objects of a label map that lie in the piece, without all others."""
    return np.where(np.isin(labels, labels[piece & (labels > 0)]), labels, 0)


pairs_found = [
    (size, k, piece, window)
    for k, s in enumerate(samples)
    for size, piece, window in touching_pairs(s.labels)
]
fine, coarse, with_distance = made


def views_of(k, piece):
    """The objects of one piece of a sample: in truth, and in two designs."""
    return {
        "truth": objects_of(samples[k].labels, piece),
        "64 × 64 grid": objects_of(made[coarse][k], piece),
        "with distance map": objects_of(made[with_distance][k], piece),
    }


def counts_of(views):
    return [len(np.unique(view)) - 1 for view in views.values()]


k, window, views = next(  # the largest pair that shows it
    (k, window, views)
    for _, k, piece, window in sorted(pairs_found, key=lambda pair: -pair[0])
    for views in [views_of(k, piece)]
    if counts_of(views) == [2, 1, 2]
)
figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 2.5))
for ax, (title, view), count in zip(
    axes, views.items(), counts_of(views), strict=True
):
    figures.overlay(samples[k].image[window], view[window], ax, width=2)
    ax.set_title(f"{title}: {count}", fontsize=9)
plt.show()

# %% tags=["remove-input"]
aji, pq = both.xs("aji", axis=1, level=1), both.xs("pq", axis=1, level=1)
objects = ceiling[["nuclei_true", "nuclei_predicted"]].loc[coarse]
real_objects = oracle.loc["grid 64 foreground + components"]
full_objects = oracle.loc["full-resolution foreground + components"]
fitted = oracle.loc["grid 64 fitted logits + components"]
Markdown(
    f"""With the true foreground, averaged onto its grid, the report's design reaches an AJI of
{aji.loc[coarse, "NuInsSeg"]:.3f} and a PQ of {pq.loc[coarse, "NuInsSeg"]:.3f} on the {len(trips)} test images of the benchmark's
first fold. A network that fits its grid to the interpolation can do better, {fitted["aji"]:.3f} and {fitted["pq"]:.3f}. Even at full
resolution it is no more than {aji.loc[fine, "NuInsSeg"]:.3f} and {pq.loc[fine, "NuInsSeg"]:.3f}. The reason is in the figure:
nuclei that touch become one object. In these images {real_objects["mean_n_gt"]:.1f} nuclei become {real_objects["mean_n_pred"]:.1f} objects on
average on the grid, and {full_objects["mean_n_pred"]:.1f} at full resolution; in the images behind this page {objects["nuclei_true"]:.1f} become {objects["nuclei_predicted"]:.1f}. The report says itself that adjacent nuclei
are merged at times. Neither rank nor learning rate can lift this limit: the better the foreground, the more surely
two nuclei in contact are one.

**To do it right:** compute what a design can reach before training it. It takes a minute and no GPU. A second target map
that parts touching nuclei lifts it to {aji.loc[with_distance, "NuInsSeg"]:.3f} and {pq.loc[with_distance, "NuInsSeg"]:.3f}."""
)

# %% [markdown]
# (claims-search)=
# ## What the search found
#
# The report searched over four ranks, three alphas and three learning rates, and trained three folds for each
# combination. That is thorough work, and its result file holds more than the report took from it. A grid in which
# every combination occurs once can be taken apart: how much of the variance of the validation Dice goes with
# each of the three?

# %%
search = pd.read_csv(reference / "report_code_param_search.csv")
factors = ["rank", "alpha", "lr"]
explained = variance_explained(search, factors, "val_dice")
explained.map("{:.1%}".format).to_frame("share of the variance").style

# %% mystnb={"figure": {"caption": "All configurations of the search. Dots of a column differ in rank, dots of a colour share an alpha; a circle marks the configuration that the report names, a square the best one.", "name": "fig-claims-search"}, "image": {"alt": "Validation Dice over the learning rate, with one column of dots for each rank at each rate. Dice rises with the rate in three clear steps. Within a step alpha 8 is highest, alpha 2 lowest, and the four ranks are level."}} tags=["hide-input"]


def rate_name(rate):
    """3e-4 rather than 0.0003."""
    return f"{rate:.0e}".replace("e-0", "e-")


rates, ranks = sorted(search["lr"].unique()), sorted(search["rank"].unique())
search["x"] = [
    rates.index(lr) + 0.16 * (ranks.index(rank) - 1.5)
    for lr, rank in zip(search["lr"], search["rank"], strict=True)
]
best = search.loc[search["val_dice"].idxmax()]
chosen = search.query("rank == 8 and alpha == 8 and lr == 3e-4").iloc[0]
figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.6))
for (alpha, group), colour, marker in zip(
    search.groupby("alpha"), figures.SERIES, ("v", "o", "^"), strict=False
):
    ax.scatter(
        group["x"],
        group["val_dice"],
        s=26,
        color=colour,
        marker=marker,
        label=f"alpha {alpha}",
    )
for row, marker, words in ((chosen, "o", "the report's"), (best, "s", "the best")):
    at = row["x"], row["val_dice"]
    ax.scatter(*at, s=130, marker=marker, facecolor="none", edgecolor="black")
    ax.annotate(words, at, xytext=(0, 12), textcoords="offset points", ha="center")
for x in range(len(rates)):
    for k, rank in enumerate(ranks):
        ax.text(x + 0.16 * (k - 1.5), 0.7695, rank, ha="center", fontsize=9)
ax.text(-0.42, 0.7695, "rank", ha="right", fontsize=9)
ax.set(
    xlabel="learning rate",
    ylabel="validation Dice",
    ylim=(0.767, 0.845),
    xlim=(-0.7, 2.5),
    xticks=range(len(rates)),
)
ax.set_xticklabels([rate_name(rate) for rate in rates])
ax.legend(loc="upper left")
plt.show()

# %% tags=["remove-input"]


def wins(table, factor, value):
    """In how many pairs of the other two factors a value of one is best."""
    rest = [name for name in factors if name != factor]
    top = table.pivot(index=rest, columns=factor, values="val_dice").idxmax(axis=1)
    return f"{(top == value).sum()} of {len(top)} pairs"


place = int(search["val_dice"].rank(ascending=False)[chosen.name])
best_name = f"rank {best['rank']:.0f}, alpha {best['alpha']:.0f}, rate {rate_name(best['lr'])}"
three = recorded.query("folds == 3")["fold"].nunique()
table_4 = printed(4).astype({"rank": int, "alpha": int})
seen = set(search["val_dice"].round(4)) | set(search["test_dice"].round(4))
assert not seen & set(table_4["dice"])
assert len(search) == len(ranks) * len(rates) * search["alpha"].nunique()
agree(29, f"{len(search)} configurations", f"{three} folds")
agree(30, best_name, f"{place} of {len(search)}")
agree(31, f"{len(table_4)} values", f"{average['dice']:.4f}")
agree(32, f"{explained['rank']:.1%}")
agree(33, "alpha 8", wins(search, "alpha", 8), f"{explained['alpha']:.1%}")
agree(34, "1e-3", wins(search, "lr", 1e-3), f"{explained['lr']:.1%}")
equal = search.query("rank == alpha and lr == 3e-4")["val_dice"]
fixed = search.query("rank == 8 and lr == 3e-4")["val_dice"]
neck = search.query("alpha == 8 and lr == 1e-3").set_index("rank")["val_dice"]
Markdown(
    f"""The learning rate explains {explained["lr"]:.1%} of the variance, alpha {explained["alpha"]:.1%}, the rank {explained["rank"]:.1%}.
The best configuration is {best_name}, with a validation Dice of {best["val_dice"]:.4f}. The one that the report names
is number {place} of {len(search)}, with {chosen["val_dice"]:.4f}. Its alpha is the best one there is, in {wins(search, "alpha", 8)} of rank
and rate. Its rate is not: {rate_name(1e-3)} is better in {wins(search, "lr", 1e-3)} of rank and alpha. As that is the edge of the grid, a still
higher rate may be better still.

Why did a higher rank seem to help? The report's Table 4 compares rows in which rank, alpha and rate change together. Where
alpha equals the rank, at a rate of {rate_name(3e-4)}, Dice rises from {equal.iloc[0]:.3f} to {equal.iloc[-1]:.3f} over ranks
{ranks[0]} to {ranks[2]}. But at the fixed rank 8, it rises from {fixed.iloc[0]:.3f} to {fixed.iloc[-1]:.3f} with alpha alone. At the best
alpha and rate, the four ranks lie within {neck.max() - neck.min():.4f} of each other, which is less than one should read anything into without
repeats."""
)

# %% tags=["hide-input"]
beside = table_4.merge(search[[*factors, "val_dice"]], on=factors, how="left")
beside["place"] = [
    int(
        search["val_dice"]
        .rank(ascending=False)[(search[factors] == row).all(axis=1)]
        .iloc[0]
    )
    for row in beside[factors].to_numpy()
]
beside["lr"] = beside["lr"].map(rate_name)
beside.columns = ["rank", "alpha", "rate", "printed", "search", "place"]
beside.style.format("{:.4f}", subset=["printed", "search"]).hide()

# %% [markdown]
# The values of Table 4 are not those of the result file, and the first of them is the mean test Dice of Table 1.
# Such slips happen when numbers are copied by hand.
#
# **To do it right:** change one thing at a time or analyse the grid as a whole; extend the grid when the best value
# lies at its edge; and let a script write the table from the result file.

# %% [markdown]
# (claims-tissues)=
# ## Which tissues are easy
#
# Table 2 shows the five best tissues, all human. The report's result files have every tissue in every fold, so each
# row can be found again. Its Dice stands beside the mean over the five folds and the place that this mean takes:

# %% tags=["hide-input"]
table_2 = printed(2).set_index("row")
scores = ["dice", "iou", "aji", "pq"]
mean = tissues.groupby("tissue")[[*scores, "n"]].mean()
mean["place"] = mean["dice"].rank(ascending=False).astype(int)
source = {}
for tissue, row in table_2.iterrows():
    mine = tissues[tissues["tissue"] == tissue].set_index("fold")[scores]
    (source[tissue],) = mine.index[
        ((mine - row[scores].astype(float)).abs() < 6e-5).all(axis=1)
    ]
pd.DataFrame(
    {
        "printed": table_2["dice"].map("{:.4f}".format),
        "fold": source,
        "mean": mean.loc[table_2.index, "dice"].map("{:.4f}".format),
        "place": mean.loc[table_2.index, "place"],
        "images": mean.loc[table_2.index, "n"].astype(int),
    }
).rename(index=lambda tissue: tissue.removeprefix("human ")).style

# %% tags=["remove-input"]
ranking = mean.sort_values("place").index
assert (ranking[4], ranking[5]) == ("human pylorus", "human epiglottis")
assert set(ranking[:4]) < set(table_2.index) and ranking[5] in table_2.index
images = mean.loc[table_2.index, "n"]
agree(22, ", ".join(str(fold) for fold in source.values()))
agree(23, f"{images.min():.0f} to {images.max():.0f} images")
kidney, placenta, liver = (
    mean.loc[f"human {t}"] for t in ("kidney", "placenta", "liver")
)
agree(
    35,
    f"{kidney['dice']:.3f} and {placenta['dice']:.3f} against {liver['dice']:.3f}",
)
agree(35, f"{kidney['pq']:.3f} and {placenta['pq']:.3f} against {liver['pq']:.3f}")
per_image = tissues.groupby("fold")[[*scores, "n"]].apply(
    lambda g: pd.Series(np.average(g[scores], axis=0, weights=g["n"]), scores)
)
for column in ("aji", "pq"):  # Table 1 follows from the rows by tissue
    assert np.allclose(per_image[column], folds_1[column], atol=6e-5)
agree(18, f"{per_image['dice'].mean():.4f} instead of {average['dice']:.4f}")
Markdown(
    f"""Each row is of one fold, and not the same one. Over all five folds {ranking[4]} is fifth and {ranking[5]} sixth; with
{images.min():.0f} to {images.max():.0f} images in a row, places that close mean little. Weighted by their images, the rows by tissue also
give back the AJI and PQ of Table 1. Its Dice is {average["dice"]:.4f} where they give {per_image["dice"].mean():.4f}: the code averaged over
batches, and the last batch is smaller.

What is easy also depends on the score. The report finds that kidney and placenta do better than liver. By Dice they do: {kidney["dice"]:.3f} and
{placenta["dice"]:.3f} against {liver["dice"]:.3f}. By PQ it is the reverse: {kidney["pq"]:.3f} and {placenta["pq"]:.3f} against {liver["pq"]:.3f}. Dice asks whether
the foreground is right, PQ whether the nuclei are. Where nuclei touch, the two part ways:"""
)

# %% mystnb={"figure": {"caption": "The report's results by tissue, means of its five folds, over the share of nuclei that touch another one in NuInsSeg.", "name": "fig-claims-tissues"}, "image": {"alt": "Two scatter plots with one dot a tissue over the share of touching nuclei. Left: Dice does not fall with it, if anything it rises. Right: PQ falls from above 0.5 to below 0.1 where most nuclei touch; mouse spleen and mouse thymus are named at the low end."}} tags=["hide-input"]
stats = pd.read_csv(
    files("nucseg") / "assets" / "nuinsseg_tissue_stats.csv", index_col="tissue"
)
joined = mean.join(stats["touching_fraction"])
figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 3), sharey=True)
for ax, column, title in zip(axes, ("dice", "pq"), ("Dice", "PQ"), strict=True):
    ax.scatter(joined["touching_fraction"], joined[column], s=18)
    ax.set(title=title, xlabel="share that touches", ylim=(0, 1), xlim=(0, 1))
    ax.xaxis.set_major_formatter("{x:.0%}")
low = joined.loc["mouse thymus"]
axes[1].annotate(
    "mouse spleen, mouse thymus",
    (low["touching_fraction"], low["pq"]),
    xytext=(-8, -2),
    textcoords="offset points",
    ha="right",
    va="center",
    fontsize=9,
)
plt.show()

# %% tags=["remove-input"]
dense = joined.loc[["mouse thymus", "mouse spleen"]]
assert (dense["touching_fraction"] > 0.5).all()
agree(36, *(f"{value:.3f}" for value in dense["pq"]))
with_dice, with_pq = (
    spearmanr(joined["touching_fraction"], joined[column]).statistic
    for column in ("dice", "pq")
)
assert with_dice > 0 > with_pq
Markdown(
    f"""Over the {len(joined)} tissues, the rank correlation with the share of touching nuclei is {with_dice:.2f} for Dice and −{abs(with_pq):.2f} for
PQ. In the mouse thymus {dense["touching_fraction"].iloc[0]:.0%} of the nuclei touch another one, and PQ is {dense["pq"].iloc[0]:.3f}; in the mouse spleen
{dense["touching_fraction"].iloc[1]:.0%}, and {dense["pq"].iloc[1]:.3f}. Their Dice is {dense["dice"].iloc[0]:.3f} and {dense["dice"].iloc[1]:.3f}, above the average. So the report's impression that boundaries are accurate
"even in densely packed regions" is right for the outer boundary of a cluster, and not for those within it.

**To do it right:** give all tissues with their number of images, average over folds, and judge instances by a score for
instances."""
)

# %% [markdown]
# (claims-batchnorm)=
# ## Frozen, but not still
#
# The report freezes the encoder by `requires_grad = False`, and trains in `train()` mode. The weights stay, but
# BatchNorm layers also keep a running mean and variance, and in this mode they update them with every batch. One
# forward pass shows it, with PyTorch's own `train()` and with that of `nucseg`, which leaves a frozen encoder's
# BatchNorm in evaluation mode:

# %%
buffers = {}
for name, switch in (("PyTorch", nn.Module.train), ("nucseg", type(model).train)):
    tried = copy.deepcopy(model)
    switch(tried, True)
    with torch.no_grad():
        tried(crop)
    before, after = (
        [m for m in one.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        for one in (model, tried)
    )
    moved = [
        not torch.equal(a.running_mean, b.running_mean)
        for a, b in zip(before, after, strict=True)
    ]
    buffers[name] = {
        "BatchNorm layers": len(moved),
        "moved": sum(moved),
        "values they keep": sum(
            m.running_mean.numel() + m.running_var.numel() for m in after
        ),
    }
pd.DataFrame(buffers).T.style.format("{:,}")

# %% tags=["remove-input"]
theirs, ours = buffers["PyTorch"], buffers["nucseg"]
agree(6, f"{theirs['moved']} of {theirs['BatchNorm layers']} BatchNorm layers")
assert ours["moved"] == 0
Markdown(
    f"""All {theirs["moved"]} layers move, with {theirs["values they keep"]:,} values that no optimiser knows of; with `nucseg` none does. In the report
this may even have helped, as the drifting statistics adapt to the weak contrast of an image normalised twice. But then it was not LoRA
alone that adapted the model, and an adapter file that keeps only LoRA and head loses part of what was trained.

**To do it right:** keep a frozen BatchNorm in `eval()` mode, and test that the base is unchanged after a training step.
The page on [LoRA](lora.ipynb) measures how far the output drifts."""
)

# %% [markdown]
# (claims-baselines)=
# ## Compared with what was published
#
# Table 3 of the report compares with U-Net, StarDist and Cellpose, "from the NuInsSeg paper". The paper
# {cite}`mahbod2024nuinsseg` has other baselines:

# %% tags=["hide-input"]
published = pd.read_csv(reference / "published_nuinsseg.csv")
paper = published[published["source"].str.contains("Mahbod")]
columns = ["dice", "aji", "pq"]
table = paper.set_index("method")[columns]
table.loc["MobileSAM + LoRA, the report"] = average[columns]
table.columns = ["Dice", "AJI", "PQ"]
table.rename_axis(None).style.format("{:.3f}")

# %% tags=["remove-input"]
assert paper["method"].str.endswith("U-Net").all()
assert "iou" not in published.columns
above = {c: f"{(average[c] > paper[c]).sum()} of {len(paper)}" for c in columns}
table_3 = printed(3).set_index("row")
gains = average[["dice", "iou", "aji", "pq"]] / table_3.loc["Cellpose"] - 1
assert f"{gains['iou']:.1%}" in ledger.loc[27, "claim"]
assert f"{gains['aji']:.1%}" in ledger.loc[27, "claim"]
agree(24, f"{len(paper)} kinds of U-Net")
agree(26, *above.values())
agree(28, f"{gains['pq']:.1%}", f"{gains['aji']:.1%}")
later = published[published["source"].str.contains("uncorrected")]
Markdown(
    f"""There are {len(paper)} kinds of U-Net, no StarDist, no Cellpose and no IoU. The report is above them in Dice for {above["dice"]}, in AJI for
{above["aji"]}, with the lenient AJI, and in PQ for {above["pq"]}. Later work on the same data reports a PQ of {later["pq"].min():.2f} to
{later["pq"].max():.2f} ({", ".join(later["method"])}). All of these tested on images outside the training folds, which the
report did not. So its foreground is at best level with that of a U-Net, and its nuclei are told apart less well, as
[the design](#claims-ceiling) lets one expect. It is not the state of the art.

The gains that the report prints, {gains["iou"]:.1%} in IoU and {gains["aji"]:.1%} in AJI, are right against the row Cellpose of Table 3. In the same
table PQ gains {gains["pq"]:.1%}, so IoU and AJI are not the two that gain most.

**To do it right:** copy baselines from a named table of a named paper, check that data, folds and scores are the
same, and say so where they are not."""
)

# %% [markdown]
# (claims-open)=
# ## What the report cannot tell
#
# Three statements may well be true, but nothing in the report can show it.
#
# - **Robust to staining.** No experiment changes the stain. The test is to shift the colours of test images
#   and watch the scores. The page on [predictions](predictions.ipynb) does so with the report's design, trained by us.
# - **What the foundation model and the attention bring.** To know it, leave them out: train the same design from
#   random weights, and with LoRA elsewhere. [Beyond the report](beyond.ipynb) does that for our system and a small base;
#   for the report's, MobileSAM's checkpoint is the half that is missing here.
# - **Hardware and cost.** The report names a strong graphics card, its result files do not record it. Every run of
#   this book writes its device, time and memory beside its scores.

# %% [markdown]
# (claims-ledger)=
# ## The ledger
#
# All claims, each with the section of this page that recomputes it. Where it says *the report's code*, the claim
# was checked by reading its code and result files, which are not part of this repository (GitHub,
# Zachary-Woo/Assignment-3, commit 43055974). *Implied* marks what the report takes for granted.

# %% tags=["remove-input"]
VERDICTS = ("holds", "partly", "does not hold", "cannot be checked")
assert set(ledger["verdict"]) == set(VERDICTS) and len(ledger) == len(
    set(ledger.index)
)
sections = ledger["section"].str.split("; ")
for number, evidence in found.items():
    for phrase in agreed[number]:
        evidence = re.sub(whole(phrase), "", evidence)
    evidence = re.sub(r"Table \d", "", evidence)
    # a number is either computed above, or the table says that it was read
    assert sections[number][0] == "code" or not re.search(r"\d", evidence), number
tally = ledger["verdict"].value_counts().reindex(VERDICTS)
computed = sum(parts[0] not in ("code", "open") for parts in sections)
Markdown(
    f"""Of {tally.sum()} claims, {tally["holds"]} hold, {tally["partly"]} hold partly, {tally["does not hold"]} do not hold, and {tally["cannot be checked"]} cannot be checked.
This page recomputes {computed} of them, with {sum(map(len, agreed.values()))} comparisons between its results and the table below."""
)

# %% mystnb={"figure": {"caption": "The verdicts on all claims of the ledger, counted from its table.", "name": "fig-claims-tally"}, "image": {"alt": "Four horizontal bars with their counts: claims that hold, that hold partly, that do not hold, and that cannot be checked. The bar of those that do not hold is the longest, followed by those that hold."}} tags=["hide-input"]
figure, ax = plt.subplots(figsize=(figures.WIDTH, 1.9))
colours = (figures.SERIES[0], figures.PREDICTION, figures.SERIES[1], "#b5b5b5")
bars = ax.barh(tally.index[::-1], tally[::-1], color=colours[::-1], height=0.7)
ax.bar_label(bars, padding=4)
ax.tick_params(axis="y", length=0)
ax.spines[["left", "bottom"]].set_visible(False)
ax.set(xticks=[])
plt.show()

# %% tags=["remove-input"]
PAGES = {
    "code": "the report's code",
    "data": "[the data](data.ipynb)",
    "lora": "[LoRA](lora.ipynb)",
    "finetuning": "[fine-tuning](finetuning.ipynb)",
}
WORDS = {
    "weights": "weights",
    "normalised": "normalised twice",
    "folds": "test images",
    "aji": "AJI",
    "bounds": "bounds",
    "ceiling": "design",
    "search": "search",
    "tissues": "tissues",
    "batchnorm": "BatchNorm",
    "baselines": "baselines",
    "open": "open questions",
}
links = PAGES | {key: f"[{words}](#claims-{key})" for key, words in WORDS.items()}
lines = ["| | The report says, and what was found | Verdict |", "|--:|:--|:--|"]
for number, row in ledger.iterrows():
    where = ", ".join(links[key] for key in sections[number])
    lines.append(
        f"| {number} | **{row['claim']}.** {said(number)} *See {where}.* | {row['verdict']} |"
    )
Markdown("\n".join(lines))

# %% [markdown]
# ## Summary
#
# - Open code and result files made this page possible. A report without them cannot be corrected, nor confirmed.
# - Count parameters, draw folds and write tables in scripts, and keep what they write. Many slips on this page
#   happened on the way from a result file to the text.
# - Test metrics on cases with a known answer, and assert the ties between scores.
# - Compute what a design can reach before training it.
# - Normalise in one place; keep a frozen BatchNorm still; test only on images that were neither trained on nor used
#   to choose.
#
# ## Further reading
#
# - {cite:t}`mahbod2024nuinsseg` describe NuInsSeg, its benchmark and its baselines.
# - {cite:t}`kumar2017aji` define AJI, {cite:t}`graham2019hovernet` AJI+, {cite:t}`kirillov2019panoptic` PQ.
# - To try: take a paper that you like, and test its scores against the two bounds of this page.

# %% tags=["remove-input"]
Markdown(f"*This page ran in {time.monotonic() - started:.0f} s.*")
