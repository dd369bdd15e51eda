# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Fine-tuning

# %% tags=["hide-input"]
import os
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

from nucseg.config import Config, apply, options, preset
from nucseg.data.datasets import NuInsSeg, Tiles
from nucseg.data.from_config import select_split
from nucseg.data.synth import Synthetic
from nucseg.errors import InputError
from nucseg.inference.evaluate import evaluate, segment_whole
from nucseg.metrics import contingency, score
from nucseg.model.network import build_model, load_model, parameter_ledger
from nucseg.records.provenance import provenance_note
from nucseg.records.runs import read_run, results_folder
from nucseg.records.statistics import summarise
from nucseg.training.loop import learning_rate, train
from nucseg.training.losses import dice_loss, focal_loss
from nucseg.viz import figures

started = time.monotonic()
figures.use_style()
tissues = (
    "human liver",
    "human pancreas",
    "human kidney",
    "human placenta",
    "human salivory gland",
    "mouse kidney",
)
real = os.environ.get("NUCSEG_DATA")  # the folder of NuInsSeg, where you have it
if real:
    dataset = Tiles(NuInsSeg(real), ("human epiglottis", "mouse femur"))
else:
    dataset = Synthetic(n_per_tissue=5, size=256, seed=1, tissues=tissues)
config = preset("quick")
with torch.random.fork_rng():
    torch.manual_seed(config.seed)  # the run below starts from these very weights
    untrained = build_model(config)
Markdown(provenance_note(dataset, untrained))

# %% [markdown]
# ## Overview
#
# This page trains. First a small run, live, on a CPU, in less than two minutes: you see the loss fall, the
# checkpoint chosen, and the same image before and after. It uses the head that separates nuclei which touch.
# Then a recorded run of the report's system on the real NuInsSeg images, with what it cost. Last, the commands
# to repeat it on a GPU of your own.
#
# ## What you need
#
# The page on LoRA. No download and no GPU: the images are made by code (or cut from NuInsSeg, where
# `NUCSEG_DATA` names its folder; the first line says which), and the base is `offline`, which comes with
# nucseg. It is MobileSAM's encoder, trained from random weights for 42 minutes on synthetic tissue and on
# BBBC038 {cite}`caicedo2019bbbc038`; it is not MobileSAM's checkpoint. The six kinds of tissue on this page were
# kept out of its training.

# %% [markdown]
# ## The loss: Dice and focal, half and half
#
# Nuclei cover a small part of most images. A loss that counts pixels is content when it predicts background.
# The report adds two losses that are not:
#
# $$
# L = \frac{D + F}{2}, \qquad
# D = 1 - \frac{2 \sum p\,t + 1}{\sum p + \sum t + 1}, \qquad
# F = \frac{1}{N} \sum \alpha_t (1 - p_t)^{\gamma} (-\log p_t)
# $$
#
# with sums over the $N$ pixels, the predicted probability $p$, the truth $t$, and $p_t = p$ on nuclei and
# $1 - p$ elsewhere. The weight $\alpha_t$ is 0.25 on nuclei and 0.75 elsewhere, and $\gamma = 2$. Soft Dice $D$
# {cite}`milletari2016vnet` compares areas. Focal loss $F$ {cite}`lin2017focal` is a cross entropy that plays down pixels
# which are right already. The head of the live run below predicts a second map, the distance map, and its loss is $L$ plus
# the cross entropy of that map, so the two curves of losses on this page are not of the same quantity.

# %% mystnb={"image": {"alt": "Two line charts. Left: over the share of an image that is nuclei, the Dice loss of an all-background prediction stays near one while its cross entropy falls to zero. Right: focal loss lies below cross entropy and is nearly zero where the probability of the true class is above one half."}, "figure": {"caption": "Left: what a prediction of nothing but background costs, when nuclei cover a given share of the image. Cross entropy lets it pass where nuclei are few, Dice does not. Right: focal loss beside cross entropy, over the probability given to the true class.", "name": "fig-losses"}} tags=["hide-input"]
shares = np.linspace(0.005, 0.5, 60)
nothing = torch.full((1, 1, 100, 100), -3.0)  # p = 0.05 everywhere
dice_of_nothing, entropy_of_nothing = [], []
for share in shares:
    target = torch.zeros(1, 1, 100, 100)
    target.view(-1)[: int(share * 10_000)] = 1
    dice_of_nothing.append(dice_loss(nothing, target).item())
    entropy_of_nothing.append(
        torch.nn.functional.binary_cross_entropy_with_logits(nothing, target).item()
    )
probability = torch.linspace(0.02, 0.99, 100)
logit = torch.logit(probability)
focal = [
    focal_loss(one.view(1, 1, 1, 1), torch.ones(1, 1, 1, 1), alpha=1.0).item()
    for one in logit
]
figure, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.6))
left.plot(shares, dice_of_nothing, label="Dice loss")
left.plot(shares, entropy_of_nothing, "--", label="cross entropy")
left.set(xlabel="share of the image that is nuclei", ylabel="loss", ylim=(0, None))
left.legend()
right.plot(probability, focal, label="focal loss, γ = 2")
right.plot(probability, -torch.log(probability), "--", label="cross entropy")
right.set(xlabel="probability given to the true class", ylabel="loss", ylim=(0, 4))
right.legend()
plt.show()

# %% [markdown]
# ## One configuration, one run
#
# A run is described by one flat configuration. Every field has a default with a reason, and a *preset* lists
# only what differs. This page uses the preset `quick`; the report's system is the preset `report`.

# %% tags=["hide-input"]
known = options(Config)
different = {
    name: (getattr(config, name), getattr(preset("report"), name))
    for name in known
    if getattr(config, name) != getattr(preset("report"), name)
}
table = pd.DataFrame(
    {
        "this page": {name: str(pair[0]) for name, pair in different.items()},
        "preset report": {name: str(pair[1]) for name, pair in different.items()},
        "what it is": {name: known[name].metadata["why"] for name in different},
    }
)
left = [
    {"selector": "td, th", "props": "text-align: left"},
    {"selector": "td.col2", "props": "min-width: 14em"},
]
table.style.set_table_styles(left).set_caption(
    "Where this page's run differs from the report's system"
)

# %% tags=["remove-input"]
split = select_split(config, dataset)
ledger = parameter_ledger(untrained)
Markdown(
    f"""The dataset is split once: {len(split.train)} images to train on, {len(split.val)} to choose the
checkpoint with, {len(split.test)} to score at the end. No choice is ever made on the last part. LoRA and head
together train {ledger["trainable"]:,} of {ledger["total"]:,} parameters
({ledger["trainable"] / ledger["total"]:.2%})."""
)

# %% [markdown]
# ## The run, live
#
# One call trains, validates after each epoch, keeps the adapter of the best one, and scores it on the test
# part. Had it been stopped half way, the same call would go on after the last whole epoch, to the same
# numbers: everything random is drawn from the seed, the epoch and the image, never from a stream that runs on.

# %%
# a progress bar while you watch, none in the built page
watched = "JPY_SESSION_NAME" in os.environ
folder = Path(tempfile.mkdtemp()) / "run"
clock = time.monotonic()
scores = train(config, dataset, folder, progress=watched)
seconds = time.monotonic() - clock
history = pd.read_csv(folder / "history.csv")
history.set_index("epoch")[
    ["train_loss", "val_dice", "val_aji", "val_pq", "seconds"]
].tail(3).round(3)

# %% tags=["remove-input"]
best = history.loc[history["val_pq"].idxmax()]
before = evaluate(untrained, dataset, split.val, progress=False)[
    ["dice", "pq"]
].mean()
Markdown(
    f"""{len(history)} epochs took {seconds:.0f} s. On the validation part Dice was {before["dice"]:.2f} and PQ
{before["pq"]:.2f} before training, and {best["val_dice"]:.2f} and {best["val_pq"]:.2f} after epoch
{best["epoch"]:.0f}, the one with the best PQ, which was kept."""
)

# %% mystnb={"image": {"alt": "Two charts over the epochs of the live run: the training loss falls, validation Dice, IoU, AJI and PQ rise, and a line marks the epoch that was kept."}, "figure": {"caption": "The live run. Left: training loss. Right: scores on the validation part; the checkpoint of the best PQ was kept.", "name": "fig-live-curves"}} tags=["hide-input"]
figures.learning_curves(history, monitor="pq")
plt.show()

# %% [markdown]
# ## Before and after
#
# One image of the test part, never seen in training. Before training LoRA adds nothing ($B = 0$) and the head
# is random, so the map means nothing. Afterwards it follows the nuclei. The head predicts two maps: where nuclei
# are, and how deep inside its nucleus a pixel lies. Between two nuclei that touch the distance map has a valley, and
# the label map is cut there, where the network has drawn it deep enough.

# %% mystnb={"image": {"alt": "Four panels of one H and E image: the image with its true outlines, the prediction before training, the prediction after training, and a map of its errors."}, "figure": {"caption": "A test image with its true outlines, the outlines predicted before and after training, and what is wrong with the latter. The scale bar assumes 0.25 µm a pixel.", "name": "fig-before-after"}} tags=["hide-input"]
trained = load_model(folder / "best.safetensors")
by_pq = scores.sort_values("pq", ignore_index=True)
middle = by_pq.iloc[len(by_pq) // 2]
index = int(dataset.table.index[dataset.table["stem"] == middle["stem"]][0])
sample = dataset[index]
before, after = (
    segment_whole(model, sample.image) for model in (untrained, trained)
)
figure, axes = plt.subplots(2, 2, figsize=(figures.WIDTH, figures.WIDTH))
figures.overlay(sample.image, sample.labels, axes[0, 0])
axes[0, 0].set_title(f"Truth: {sample.labels.max()} nuclei")
figures.scale_bar(axes[0, 0])
for ax, labels, title in (
    (axes[0, 1], before, "Before"),
    (axes[1, 0], after, "After"),
):
    figures.overlay(sample.image, labels, ax)
    result = score(sample.labels, labels)
    ax.set_title(
        f"{title}: {labels.max()} objects, Dice {result.dice:.2f}, PQ {result.pq:.2f}"
    )
figures.error_map(sample.labels, after, axes[1, 1])
axes[1, 1].set_title("Errors after training")
plt.show()

# %% [markdown]
# ## What the scores say
#
# Dice and IoU compare foregrounds. AJI and PQ compare nuclei, and are what instance segmentation is about. With the true
# nuclei $T_i$ and the predicted ones $P_j$:
#
# | score | what it is |
# | --- | --- |
# | Dice | $2 \lvert T \cap P \rvert / (\lvert T \rvert + \lvert P \rvert)$ of the two foregrounds |
# | IoU | $\lvert T \cap P \rvert / \lvert T \cup P \rvert$ of the two foregrounds |
# | SQ | of the pairs $T_i, P_j$ with an IoU above 0.5, the *true positives*: their mean IoU |
# | RQ | their number over itself plus half of the nuclei, true and predicted, that are in no pair: an F1 score |
# | PQ | SQ times RQ {cite}`kirillov2019panoptic` |
# | AJI | each $T_i$ takes the $P_j$ of the highest IoU; the pixels that the pairs share, over their unions and all $P_j$ that none took {cite}`kumar2017aji` |
# | AJI+ | the same, but a $P_j$ can be taken once only {cite}`graham2019hovernet` |
# | AJI, matched only | AJI+ that forgives missed nuclei, as the report's code computes it; here for comparison alone |
#
# Each is 1 for a perfect label map. How far they can lie apart shows in the smallest example: two equal nuclei that
# touch, found as one object.

# %%
two = np.zeros((20, 30), int)
two[5:15, 5:15], two[5:15, 15:25] = 1, 2
fused = score(two, (two > 0).astype(int))
{name: getattr(fused, name) for name in ("dice", "iou", "aji", "aji_plus", "pq")}

# %% [markdown]
# Now the live run:

# %% tags=["hide-input"]
names = {
    "dice": "Dice", "iou": "IoU", "aji": "AJI", "aji_plus": "AJI+",
    "pq": "PQ", "sq": "SQ", "rq": "RQ", "aji_matched_only": "AJI, matched only",
}  # fmt: skip


def as_table(scores, caption):
    table = summarise(scores).rename(index=names)
    table["95% interval"] = [
        f"{low:.3f} to {high:.3f}"
        for low, high in zip(table["low"], table["high"], strict=True)
    ]
    table = table[["mean", "95% interval"]]
    return table.style.format({"mean": "{:.3f}"}).set_caption(caption)


as_table(scores, f"The live run on its {len(scores)} test images")

# %% tags=["remove-input"]
table = contingency(sample.labels, after)
mostly = table.overlap > table.true_areas[:, None] / 2  # this object has most of it
shared = int(mostly[:, mostly.sum(axis=0) > 1].any(axis=1).sum())
Markdown(
    f"""Each value is the mean over images, with a bootstrap interval over them: wide, as it should be for
{len(scores)} images. There are {scores["nuclei_true"].sum()} true nuclei in these images
and {scores["nuclei_predicted"].sum()} predicted objects. In the figure above, {shared or "none"} of the
{sample.labels.max()} nuclei {"lie" if shared else "lies"} mostly in an object that holds another one as well."""
)

# %% [markdown]
# ## The learning rate
#
# AdamW's rate follows half a cosine down to nearly zero {cite}`loshchilov2017sgdr`. The report speaks of
# *warm restarts*; its code runs a single cycle. Both are one number here, `cycles`.

# %% mystnb={"image": {"alt": "Line chart of the learning rate over training: one cycle falls from the full rate to nearly zero once; two cycles do so twice, with a jump back in the middle."}, "figure": {"caption": "The learning rate of the preset report, as the report's code runs it (one cycle) and as its text says (here with two).", "name": "fig-learning-rate"}} tags=["hide-input"]
progress = np.linspace(0, 1, 400, endpoint=False)
figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.2))
for cycles, style in ((1, "-"), (2, "--")):
    one = apply(preset("report"), {"cycles": cycles}, "this page")
    rates = [learning_rate(one, t) for t in progress]
    ax.plot(progress * one.epochs, rates, style, label=f"cycles = {cycles}")
ax.set(xlabel="epoch", ylabel="learning rate")
ax.legend()
plt.show()

# %% [markdown]
# ## The recorded run on NuInsSeg
#
# The same loop with the preset `report` ran on the real images. What it left behind is in the repository
# under `results/`, and everything below is read from there.

# %% tags=["remove-input"]
try:
    run = read_run(results_folder() / "report" / "fold1-random-cpu")
except InputError as error:  # an installed package without the repository
    raise SystemExit(str(error)) from None
about = run.about
ran = about["config"]
Markdown(
    f"""**Behind this section:** {run.provenance}

It is the report's design (its LoRA, head and loss) without its pretraining, and at a CPU's budget; two slips of the
report's code, {{doc}}`images normalised twice and a BatchNorm that drifts <claims>`, are left out. It ran from the base
`{about["base"]["name"]}`, because neither a GPU nor the official checkpoint was at hand: {ran["epochs"]} epochs where the report has
{preset("report").epochs}, each on one {ran["crop"]} px window of every training image as the encoder sees it at
{ran["size"]} px, and {about["split"]["val"]} validation images. Test images are whole. So the numbers say what
this design learns without any pretraining in {about["seconds"] / 60:.0f} minutes, and nothing about
the report's own scores."""
)

# %% mystnb={"image": {"alt": "Two charts over the epochs of the recorded run on NuInsSeg: training loss and validation scores, with a line at the epoch that was kept."}, "figure": {"caption": "The recorded run: preset report at a CPU's budget, fold 1 of the benchmark's five, base random.", "name": "fig-recorded-curves"}} tags=["hide-input"]
figures.learning_curves(run.history)
plt.show()

# %% tags=["hide-input"]
as_table(
    run.scores,
    f"NuInsSeg (re-encoded), {about['split']['name']}, {len(run.scores)} test images, base random",
)

# %% tags=["remove-input"]
means = run.scores.mean(numeric_only=True)
published = pd.read_csv(
    results_folder().parent / "book" / "reference" / "published_nuinsseg.csv"
)
unets = published[published["method"].str.endswith("U-Net")]["dice"]
epoch_seconds = run.history["seconds"].median()
mine = about["command"].replace(
    "--out results/report/fold1-random-cpu", "--out results/mine/fold1"
)
command = mine.replace(" --", " \\\n    --")
Markdown(
    f"""A Dice of {means["dice"]:.2f} beside a PQ of {means["pq"]:.2f}: the foreground is roughly found (published U-Nets reach
{unets.min():.2f} to {unets.max():.2f}), and the nuclei in it are not told apart. The images hold {means["nuclei_true"]:.0f} nuclei on average, the predictions
{means["nuclei_predicted"]:.0f} objects.

An epoch took {epoch_seconds:.0f} s at the median, validation included, on a machine that did other work
meanwhile, and the process used
{about["peak_memory_mib"] / 1024:.1f} GiB at most. It is repeated by

```bash
{command}
```

with `NUCSEG_DATA` set to the folder of the images."""
)

# %% [markdown]
# ## On a GPU of your own
#
# The preset as it stands is meant for one GPU: whole images at 1024 px, batches of four, in bfloat16 where
# the card has it. Three commands, the first two once:
#
# ```bash
# nucseg fetch nuinsseg --out data/nuinsseg     # 1.6 GB from Zenodo, verified
# nucseg fetch mobile_sam                       # 41 MB, verified; from then on the default base
# nucseg train --preset report --root data/nuinsseg --fold 1 --out results/report/fold1
# ```
#
# You can stop it at any time and run the same command again to resume. `nucseg train --help` lists every option;
# options can also be set in a TOML file:
#
# ```toml
# # mine.toml:  nucseg train --preset report --config mine.toml --out results/mine/run
# lora_target = "qkv"
# rank = 4
# lr = 1e-3
# ```

# %% [markdown]
# ## Summary
#
# - Dice keeps few nuclei from being ignored; focal loss keeps easy pixels from drowning the hard ones.
# - A run is one configuration and one folder: history, scores, adapter, and a `run.json` that says from what.
# - The checkpoint is chosen on validation images, never on test images.
# - A good foreground is not yet a good instance segmentation: compare Dice with PQ.
#
# ## Further reading
#
# - {cite:t}`lin2017focal` on focal loss, {cite:t}`milletari2016vnet` on the Dice loss.
# - {cite:t}`loshchilov2017sgdr` on cosine schedules and restarts.
# - {cite:t}`kirillov2019panoptic` on PQ, {cite:t}`kumar2017aji` on AJI.

# %% tags=["remove-input"]
Markdown(f"*This page ran in {time.monotonic() - started:.0f} s.*")
