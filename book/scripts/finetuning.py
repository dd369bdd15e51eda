# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Fine-tuning
#
# In this chapter we train a model. We build the loss and the training step by hand, compare both with the package's,
# and then train on a CPU for about a minute: you see the loss fall, the best epoch chosen, and the same image before
# and after. Recorded runs on the real NuInsSeg images follow, then the cost of a training step, and last the commands
# for a GPU.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to write a Dice and a focal loss, to write a training step that changes only what it should, to
# read learning curves, and to turn predicted maps into nuclei and scores.
#
# **You need** the chapter [LoRA: fine-tuning with few weights](lora.ipynb), and [The data: nuclei in stained
# tissue](data.ipynb) for the target maps. You need no download and no GPU: the images are synthetic, or cut from
# NuInsSeg if the environment variable `NUCSEG_DATA` names its folder.
#
# **Time**: 30 minutes to read, two minutes to run.
# ```

# %%
import copy
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from torch import nn

from nucseg.config import apply, preset
from nucseg.data import augment
from nucseg.data.datasets import NuInsSeg, Tiles
from nucseg.data.from_config import select_split
from nucseg.data.synth import Synthetic
from nucseg.inference.evaluate import evaluate
from nucseg.instances import DISTANCE_PX, encode, labels_from
from nucseg.metrics import score
from nucseg.model.network import build_model, load_model, parameter_ledger, predict
from nucseg.records.provenance import provenance_note
from nucseg.records.quotes import check
from nucseg.records.runs import read_run, results_folder
from nucseg.training import loop, losses
from nucseg.viz import figures
from nucseg.viz.chapters import finetuning as chapter
from nucseg.viz.chapters.listing import listing

figures.use_style()
tissues = ("liver", "pancreas", "kidney", "placenta", "salivory gland")
tissues = (*(f"human {organ}" for organ in tissues), "mouse kidney")
real = os.environ.get("NUCSEG_DATA")  # the folder of NuInsSeg, where you have it
if real:
    dataset = Tiles(NuInsSeg(real), ("human epiglottis", "mouse femur"))
else:
    dataset = Synthetic(n_per_tissue=5, size=256, seed=1, tissues=tissues)

# %% [markdown]
# One flat configuration describes the model and its training; more on it below. Its {term}`base` is `offline`, which
# comes with nucseg: MobileSAM's encoder, trained from random weights for 42 minutes on synthetic tissue and on
# BBBC038 {cite}`caicedo2019bbbc038`. It is not MobileSAM's checkpoint. The six tissues that this page draws,
# if it is built without real images, were kept out of its training.

# %%
config = apply(preset("quick"), {"train_images": 20, "test_images": 6}, "this page")
with torch.random.fork_rng():
    torch.manual_seed(config.seed)  # the run below starts from these very weights
    untrained = build_model(config)

results = results_folder()  # of the recorded runs, to which we come later
instance = read_run(results / "folds" / "offline-small" / "fold_1")
design = read_run(results / "report" / "fold1-random-cpu")
Markdown(provenance_note(dataset, untrained, [instance, design]))

# %% [markdown]
# ## The loss
#
# Nuclei cover a small part of most images, so a plain average over pixels is already low for a network that predicts
# background everywhere. The report counters this with two losses in equal parts:
#
# $$
# L = \frac{D + F}{2}, \qquad
# D = 1 - \frac{2 \sum p\,t + 1}{\sum p + \sum t + 1},
# $$
#
# $$
# F = \frac{1}{N} \sum \alpha_t (1 - p_t)^{\gamma} (-\log p_t)
# $$
#
# The sums run over the $N$ pixels; $p$ is the predicted probability of a nucleus, $t$ the truth, 1 on nuclei and 0
# elsewhere, and $p_t$ the probability given to the truth: $p$ on nuclei and $1 - p$ elsewhere. The weight $\alpha_t$
# (not LoRA's $\alpha$) is 0.25 on nuclei and 0.75 elsewhere, and $\gamma = 2$. The {term}`Dice loss` $D$
# {cite}`milletari2016vnet` compares the areas of nuclei, so easy background does not dilute it. The
# {term}`focal loss` $F$ {cite}`lin2017focal` is a cross-entropy that gives little weight to pixels that are right
# already. In code, from the network's outputs before the sigmoid, the logits:


# %%
def dice(logits, truth):
    p = torch.sigmoid(logits)
    return 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)


def focal(logits, truth, alpha=0.25, gamma=2):
    p = torch.sigmoid(logits)
    p_t = torch.where(truth > 0, p, 1 - p)
    alpha_t = torch.where(truth > 0, alpha, 1 - alpha)
    return (alpha_t * (1 - p_t) ** gamma * -torch.log(p_t)).mean()


# %% [markdown]
# For a single image, the package's losses give the same numbers:

# %%
torch.manual_seed(0)
logits = torch.randn(1, 1, 64, 64)
truth = (torch.rand(1, 1, 64, 64) < 0.2).float()
both = (dice(logits, truth) + focal(logits, truth)) / 2
torch.testing.assert_close(dice(logits, truth), losses.dice_loss(logits, truth))
torch.testing.assert_close(focal(logits, truth), losses.focal_loss(logits, truth))
torch.testing.assert_close(both, losses.dice_focal_loss(logits, truth))
both

# %% [markdown]
# Two details differ. With several images, the package computes the Dice loss per image and then averages it, so that
# an image with few nuclei counts as much as a crowded one. And the package never takes the logarithm of a rounded
# probability. Where the network is very sure and wrong, the probability of the true class rounds to 0, and our
# `focal` gives infinity:

# %%
sure, nucleus = torch.tensor([[-200.0]]), torch.ones(1, 1)
focal(sure, nucleus), losses.focal_loss(sure, nucleus)

# %%
listing(losses.focal_loss)

# %% mystnb={"image": {"alt": "Two line charts. Left: over the share of an image that is nuclei, the Dice loss of an all-background prediction stays near one while its cross-entropy falls to zero. Right: focal loss lies below cross-entropy and is nearly zero where the probability of the true class is above one half."}, "figure": {"caption": "Left: what a prediction of nothing but background costs, when nuclei cover a given share of the image. Cross-entropy lets it pass where nuclei are few, Dice does not. Right: focal loss beside cross-entropy, over the probability given to the true class.", "name": "fig-losses"}}
chapter.plot_losses()
plt.show()

# %% [markdown]
# The {term}`instance head`, which we train in this chapter, also predicts the {term}`distance map`. For it, the loss
# has a second term: the cross-entropy between predicted and target map, which is smallest when they are equal. So the
# training losses of this head and of the report's head cannot be compared.

# %% tags=["hide-input"]
check("0.75", 1 - config.focal_alpha)
assert config.focal_alpha == 0.25 and config.focal_gamma == 2, "0.25, and gamma 2"
assert torch.isinf(focal(sure, nucleus)), "our line gives infinity"
assert torch.isfinite(losses.focal_loss(sure, nucleus)), "the package's does not"

# %% [markdown]
# ## A batch
#
# The network learns from images and {term}`target maps`. First each image is changed at random, by flips, rotations,
# and shifts of its stain, so that the network hardly ever sees the same pixels twice. The label map is turned with
# its image, and then encoded:


# %%
def batch(indices, rng):
    images, targets = [], []
    for index in indices:
        sample = augment.histology(dataset[index], rng)
        maps = encode(sample.labels, DISTANCE_PX * config.size / 512)
        image = np.ascontiguousarray(sample.image.transpose(2, 0, 1))
        images.append(torch.from_numpy(image))
        targets.append(torch.from_numpy(maps))
    return torch.stack(images), torch.stack(targets)


split = select_split(config, dataset)
images, targets = batch(split.train[:4], np.random.default_rng(0))
images.shape, targets.shape

# %% mystnb={"image": {"alt": "A grid of three rows and four columns. Four images of stained tissue; below each its foreground, white on black; below that its distance map, in which touching nuclei are separated by dark lines."}, "figure": {"caption": "One batch: four augmented images, and the two target maps of each. At 256 px the distance map rises over 3 px only, so it resembles a slightly smaller foreground. The scale bar assumes 0.25 µm per pixel. Images: {{ tissue }}.", "name": "fig-batch"}}
chapter.plot_batch(images, targets)
plt.show()

# %% [markdown]
# The dataset was split once: into images to train on, images to choose the {term}`checkpoint` with (the weights of
# the best epoch), and images to score at the end. No choice is ever made on the last part.

# %%
pd.Series(
    {
        "train": len(split.train),
        "validation": len(split.val),
        "test": len(split.test),
    },
    name="images",
).to_frame()

# %% [markdown]
# ## The training step
#
# One step predicts, compares, and updates the trainable weights. All others are frozen and are not given to the
# optimiser:

# %%
model = copy.deepcopy(untrained)
free = [p for p in model.parameters() if p.requires_grad]
optimiser = torch.optim.AdamW(free, lr=config.lr, weight_decay=config.weight_decay)


def step(images, targets):
    model.train()  # BatchNorm of the frozen encoder stays in eval mode
    logits = model(images)
    loss = losses.dice_focal_loss(logits[:, :1], targets[:, :1])
    loss = loss + losses.distance_loss(logits[:, 1:], targets[:, 1:])
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(free, config.grad_clip)
    optimiser.step()
    return loss.item()


# %% [markdown]
# Before a long run, it pays to check that a model can learn a single batch by heart. If it cannot, something is
# wrong: the loss, the targets, or which weights are frozen. Here six steps are enough to see the loss fall; a
# thorough check goes on until the loss is close to its minimum.

# %%
by_heart = [step(images, targets) for _ in range(6)]
assert by_heart[-1] < 0.9 * by_heart[0]
[round(value, 3) for value in by_heart]

# %% [markdown]
# The package's loop does the same for every batch of an epoch. It adds a learning rate that falls during the run, an
# error when the loss is no longer finite, and options that this page does not use: a moving average of the weights
# and 16-bit arithmetic on a GPU.

# %%
listing(loop.train_epoch)

# %% [markdown]
# ## One configuration, one run
#
# A {term}`run` is described by one flat configuration. Every field has a default, and a *preset* lists only the
# fields that differ from it. This page uses the preset `quick`, with a few images only. The preset
# `report` describes the report's system. The table lists where they differ. Its numbers of images are upper limits:
# built with real images, this page takes them from the tiles of two tissues instead of the synthetic `data`.

# %%
chapter.config_table(config, preset("report"), ("this page", "report"))

# %% [markdown]
# On this page, LoRA and head together have 412,146 of the 10,542,238 parameters, 3.91%; only these are trained:

# %%
ledger = parameter_ledger(untrained)
ledger

# %% tags=["hide-input"]
check("412,146", ledger["trainable"])
check("10,542,238", ledger["total"])
check("3.91%", ledger["trainable"] / ledger["total"])

# %% [markdown]
# ## The run, live
#
# One call trains, validates after each epoch, keeps the {term}`adapter` of the best one, and scores it on the
# {term}`test part`. If it is interrupted, the same call resumes after the last complete epoch and gives the same
# numbers, because everything random follows from the {term}`seed`, the epoch and the image.

# %%
watched = "JPY_SESSION_NAME" in os.environ  # a progress bar while you watch
folder = Path(tempfile.mkdtemp()) / "run"
scores = loop.train(config, dataset, folder, progress=watched)
history = pd.read_csv(folder / "history.csv")
columns = ["train_loss", "val_dice", "val_aji", "val_pq", "seconds"]
history.set_index("epoch")[columns].tail(3).round(3)

# %% mystnb={"image": {"alt": "Two charts over the epochs of the live run: the training loss falls, validation Dice, IoU, AJI and PQ rise, and a line marks the epoch that was kept."}, "figure": {"caption": "The live run. Left: training loss. Right: scores on the validation part; the checkpoint of the best PQ was kept.", "name": "fig-live-curves"}}
figures.learning_curves(history, monitor="pq")
plt.show()

# %% [markdown]
# Read the curves together. The training loss falls as long as the model fits its training images better. The
# validation scores say whether that helps on other images. When they stop rising while the loss still falls, the
# model has begun to learn its training images by heart: it overfits.

# %%
before = evaluate(untrained, dataset, split.val, progress=False)["pq"].mean()
best = history["val_pq"].max()
pd.Series(
    {"before training": before, "best epoch": best}, name="validation PQ"
).to_frame().round(3)

# %% tags=["hide-input"]
assert best > before, "training helps on the validation part"
assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0], (
    "the loss falls"
)

# %% [markdown]
# ## From maps to nuclei
#
# `predict` gives the network's maps as values from 0 to 1, and `labels_from` decodes them into a {term}`label map`:
# the foreground above one half, cut along the valleys of the distance map. As an example we take the test image with
# the median PQ.

# %%
trained = load_model(folder / "best.safetensors")
middle = scores.sort_values("pq", ignore_index=True).iloc[len(scores) // 2]
index = int(np.flatnonzero(dataset.table["stem"] == middle["stem"])[0])
sample = dataset[index]
maps = predict(trained, sample.image)
after = labels_from(maps)
print("maps:", maps.shape, "nuclei:", after.max())

# %% mystnb={"image": {"alt": "Four panels of one test image: the image, the predicted foreground, the predicted distance map, and the image with the outlines decoded from the two maps."}, "figure": {"caption": "A test image, the two maps predicted for it, and the label map decoded from them. The scale bar assumes 0.25 µm per pixel. Image: {{ tissue }}.", "name": "fig-maps"}}
chapter.plot_maps(sample, maps, after)
plt.show()

# %% [markdown]
# Before training, LoRA adds nothing ($B = 0$) and the head is random, so the outlines hardly follow the nuclei:

# %% mystnb={"image": {"alt": "Four panels of one H and E image: the image with its true outlines, the prediction before training, the prediction after training, and a map of its errors."}, "figure": {"caption": "The same test image with its true outlines, the outlines predicted before and after training, and the errors after. The scale bar assumes 0.25 µm per pixel. Image: {{ tissue }}.", "name": "fig-before-after"}}
chapter.plot_before_after(
    sample, labels_from(predict(untrained, sample.image)), after
)
plt.show()

# %% [markdown]
# ## What the scores say
#
# Dice and IoU compare foregrounds. AJI and PQ compare nuclei, which is what instance segmentation is about. $T$ and
# $P$ are the true and the predicted foreground, $T_i$ and $P_j$ single true and predicted nuclei. TP, FP and FN count
# the matched pairs, the predictions without a match ({term}`false positives <false positive>`) and the true nuclei
# without one (false negatives):
#
# | score | what it is |
# | --- | --- |
# | {term}`Dice <dice coefficient>` | $2 \lvert T \cap P \rvert / (\lvert T \rvert + \lvert P \rvert)$ of the two foregrounds |
# | {term}`IoU <intersection over union>` | $\lvert T \cap P \rvert / \lvert T \cup P \rvert$ of the two foregrounds |
# | {term}`SQ <segmentation quality>` | mean IoU of the {term}`true positives <true positive>`, the pairs $T_i, P_j$ with an IoU above 0.5 |
# | {term}`RQ <recognition quality>` | TP / (TP + FP/2 + FN/2), an F1 score of these pairs |
# | {term}`PQ <panoptic quality>` | SQ times RQ {cite}`kirillov2019panoptic` |
# | {term}`AJI <aggregated jaccard index>` | each $T_i$ is paired with the $P_j$ of the highest IoU; the sum of the pairs' intersections, divided by the sum of their unions plus the areas of all $T_i$ and $P_j$ without a partner {cite}`kumar2017aji` |
# | AJI+ | the same, but each $P_j$ is paired at most once {cite}`graham2019hovernet` |
# | AJI, matched only | AJI+ without the areas of missed nuclei, as the report's code computes it; only for comparison with the report |
#
# Each is 1 for a perfect label map. A small example shows how far apart they can be: two equal nuclei that touch,
# predicted as one object.

# %%
two = np.zeros((20, 30), int)
two[5:15, 5:15], two[5:15, 15:25] = 1, 2
fused = score(two, (two > 0).astype(int))
{
    name: round(getattr(fused, name), 3)
    for name in ("dice", "iou", "aji", "aji_plus", "pq")
}

# %% [markdown]
# The foreground is perfect, so Dice is 1; but no nucleus is found, so PQ is 0. Now the live run:

# %%
chapter.scores_table({f"{len(scores)} test images": scores})

# %% [markdown]
# Each value is the mean over images, with a 95% {term}`bootstrap` interval over the images. From so few of them it
# says little, and tiles of one image may be in the training and the test part: this is a demonstration, not a
# measurement.

# %% tags=["hide-input"]
assert fused.dice == 1 and fused.pq == 0, "Dice 1 and PQ 0"

# %% [markdown]
# ## The learning rate
#
# During the run, AdamW's learning rate falls to nearly zero along half a cosine {cite}`loshchilov2017sgdr`. The
# report's text speaks of *warm restarts*, which repeat this several times; its code runs a single cycle. Here the
# option `cycles` sets the number.

# %% mystnb={"image": {"alt": "Line chart of the learning rate over training: one cycle falls from the full rate to nearly zero once; two cycles do so twice, with a jump back in the middle."}, "figure": {"caption": "The learning rate of the preset report, as the report's code runs it (one cycle) and as its text says (here with two).", "name": "fig-learning-rate"}}
once, twice = (apply(preset("report"), {"cycles": n}, "this page") for n in (1, 2))
chapter.plot_learning_rates({"one cycle": once, "two cycles": twice})
plt.show()

# %% [markdown]
# ## Recorded runs on NuInsSeg
#
# The same loop ran on the real images, on fold 1 of the benchmark. Its records are in the repository under
# `results/`: `history.csv` with one row per epoch, `scores.csv` with one row per test image, and `run.json` with the
# configuration, data and versions. At the top of this page, `read_run` has read two such folders, as `instance` and
# `design`:

# %%
instance.history.set_index("epoch").drop(columns="lr").tail(2).round(3)

# %% [markdown]
# The first run, `instance`, trained LoRA and the instance head on the base `offline` for 10 epochs, starting from the
# base's pretrained head; each epoch saw one crop of each of the 452 training images. It took 17 minutes on one CPU
# thread.

# %% mystnb={"image": {"alt": "Two charts over the epochs of the recorded run on NuInsSeg: training loss and validation scores, with a line at the epoch that was kept."}, "figure": {"caption": "The recorded run of the instance head: fold 1 of the benchmark's five, base offline, one seed.", "name": "fig-recorded-curves"}}
figures.learning_curves(instance.history, monitor="pq")
plt.show()

# %% [markdown]
# The second, `design`, is the report's design (its LoRA, head and loss) without any pretraining: 14 epochs from
# random weights, where the report trains 50 from MobileSAM's. So it shows what this design learns in 53 minutes on a
# CPU, and says nothing about the report's own scores. It does not repeat two details of the report's code, which the
# chapter [What holds](claims.ipynb) describes: images that are normalised twice, and a BatchNorm that drifts.

# %%
chapter.scores_table(
    {"instance head": instance.scores, "report's design": design.scores}
)

# %% [markdown]
# The report's design reaches a Dice of 0.684 and a PQ of 0.242: the foreground is roughly found, but many nuclei in
# it are not separated. The images hold 53 nuclei on average, the predictions 34 objects. The instance head reaches
# 0.787 and 0.463, with 51 objects. (Published U-Nets have a Dice of 0.766 to 0.814.) The two runs, one seed each,
# differ in base, head and budget, so this comparison does not say which of them matters; [Beyond the
# report](beyond.ipynb) changes one thing at a time.

# %% tags=["hide-input"]
ours, its = (run.scores.mean(numeric_only=True) for run in (instance, design))
check("0.684", its["dice"])
check("0.242", its["pq"])
check("0.787", ours["dice"])
check("0.463", ours["pq"])
counts = [its["nuclei_true"], its["nuclei_predicted"], ours["nuclei_predicted"]]
assert [round(n) for n in counts] == [53, 34, 51], "53 nuclei, 34 and 51 objects"
reference = results.parent / "book" / "reference" / "published_nuinsseg.csv"
published = pd.read_csv(reference).set_index("method")["dice"]
unets = published[published.index.str.endswith("U-Net")]
check("0.766", unets.min())
check("0.814", unets.max())
minutes = [round(run.about["seconds"] / 60) for run in (instance, design)]
assert minutes == [17, 53], "17 and 53 minutes"
assert instance.about["split"]["train"] == 452, "452 training images"
assert [len(run.history) for run in (instance, design)] == [10, 14], (
    "10 and 14 epochs"
)
assert preset("report").epochs == 50, "where the report has 50"
assert {run.about["base"]["name"] for run in (instance, design)} == {
    "offline",
    "random",
}

# %% [markdown]
# ## What a step costs
#
# LoRA trains few weights. Does it also train faster? To find out, we timed one step, on a batch of four crops of 256
# px, for several ways to train, on an otherwise idle CPU with two threads:

# %%
costs = pd.read_csv(results / "training-cost" / "costs.csv")
ways = {
    "rank-0": "instance head alone",
    "lora-4": "with LoRA of rank 4",
    "lora-8": "with LoRA of rank 8",
    "full": "with the whole encoder",
    "linear": "report's head, LoRA of rank 8",
}
chapter.costs_table(costs, ways)

# %% [markdown]
# LoRA hardly trains faster here. A step with LoRA of rank 8 takes 0.56 s, only 7% less than the 0.60 s of full
# fine-tuning, because in both the gradient has to pass through the encoder. Only training the head alone is clearly
# cheaper: 0.38 s. LoRA saves some memory (here 11%), and above all space on disk: the adapter holds 7% of the weights
# that full fine-tuning would have to store.

# %% tags=["hide-input"]
cost = costs.set_index("variant")
check("0.56", cost.loc["lora-8", "seconds_a_step"])
check("0.60", cost.loc["full", "seconds_a_step"])
check("0.38", cost.loc["rank-0", "seconds_a_step"])
relative = 1 - cost.loc["lora-8"].drop("precision") / cost.loc["full"].drop(
    "precision"
)
check("7%", relative["seconds_a_step"])
check("11%", relative["peak_memory_mib"])
check("7%", 1 - relative["trainable"])

# %% [markdown]
# ## On a GPU of your own
#
# The preset `report` is meant for one GPU: whole images at 1024 px, batches of four, in bfloat16 (16-bit arithmetic)
# if the card supports it. You need three commands, the first two only once:
#
# ```bash
# nucseg fetch nuinsseg --out data/nuinsseg  # 1.6 GB from Zenodo, verified
# nucseg fetch mobile_sam                    # 41 MB, verified; then the default base
# nucseg train --preset report --root data/nuinsseg --fold 1 \
#     --out results/report/fold_1
# ```
#
# You can stop it at any time and run the same command again to resume. For the instance head, use `--preset best`.
# `nucseg train --help` lists every option; options can also be set in a TOML file:
#
# ```toml
# # mine.toml:  nucseg train --preset report --config mine.toml --out results/mine/run
# lora_target = "qkv"
# rank = 4
# lr = 1e-3
# ```
#
# Each recorded run stores the command that repeats it:

# %%
print(instance.about["command"].replace(" --", " \\\n    --"))

# %% [markdown]
# ## Summary
#
# - The Dice loss keeps sparse nuclei from being ignored; the focal loss keeps many easy pixels from outweighing the
#   hard ones.
# - A training step is ten lines: predict, compute the loss, backpropagate, clip the gradient, update the trainable
#   weights.
# - The checkpoint is chosen on validation images, never on test images.
# - A good foreground is not yet a good instance segmentation: compare Dice with PQ.
# - LoRA saves storage and some memory, but little time, because the gradient still passes through the encoder.

# %% [markdown]
# ## Exercises
#
# ```{exercise} Choosing on the test part
# :label: ex-finetuning-choice
# Someone trains for 50 epochs, scores the test images after each, and reports the best epoch. Why is that score too
# good, even if the test images were never trained on?
# ```
#
# ```{solution} ex-finetuning-choice
# :class: dropdown
# The scores of the epochs scatter by chance. The best of 50 is partly the luckiest on these very images, and that
# luck does not carry over to other images. If the epoch is chosen on a {term}`validation part`, only the validation
# score is optimistic; the test score is not.
# ```

# %% [markdown]
# ```{exercise} Easy pixels
# :label: ex-finetuning-easy
# A pixel is predicted with $p_t = 0.9$, another with $p_t = 0.5$. By what factor does focal loss with $\gamma = 2$
# scale down the cross-entropy of each?
# ```
#
# ```{solution} ex-finetuning-easy
# :class: dropdown
# By $(1 - 0.9)^2 = 0.01$ and by $(1 - 0.5)^2 = 0.25$. So the easy pixel is scaled down 25 times more than the
# doubtful one.
# ```

# %% tags=["hide-input"]
check("0.01", (1 - 0.9) ** 2)

# %% [markdown]
# ```{exercise} What moved?
# :label: ex-finetuning-moved
# Run one `step` on the corners of `images` and `targets` (`[..., :64, :64]`) and list the entries of
# `model.state_dict()` that changed. Which parts of the model do they belong to? Did any statistics of a BatchNorm
# change?
# ```

# %% [markdown]
# ```{solution-start} ex-finetuning-moved
# :class: dropdown
# ```

# %%
start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
step(images[..., :64, :64], targets[..., :64, :64])
changed = [n for n, t in model.state_dict().items() if not torch.equal(t, start[n])]
assert changed and all("lora_" in n or n.startswith("head.") for n in changed)

# %% [markdown]
# They belong to LoRA's matrices and to the head. The running statistics of the encoder's BatchNorm layers did not
# change; the chapter on [LoRA: fine-tuning with few weights](lora.ipynb) explains why.
#
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} An image without nuclei
# :label: ex-finetuning-empty
# The Dice loss adds 1 to numerator and denominator. Take an image without nuclei, a prediction that is nearly empty
# (logits of −20) and one that is full (logits of 20). Compute the loss of both with this 1 and without it:
# `losses.dice_loss` has the argument `smooth`. What goes wrong without?
# ```

# %% [markdown]
# ```{solution-start} ex-finetuning-empty
# :class: dropdown
# ```

# %%
nothing = torch.zeros(1, 1, 64, 64)
right, wrong = nothing - 20, nothing + 20
without = [losses.dice_loss(z, nothing, smooth=0).item() for z in (right, wrong)]
with_one = [losses.dice_loss(z, nothing).item() for z in (right, wrong)]
assert without == [1, 1]
assert with_one[0] < 1e-4 and with_one[1] > 0.99

# %% [markdown]
# Without the 1, the loss is 1 for the right answer and for the wrong one, and its gradient is zero: such an image
# teaches nothing. With it, the loss of the right answer is nearly 0.
#
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} A learning rate with warm-up
# :label: ex-finetuning-warmup
# Write `rate(progress, top, low, warmup)`: half a cosine from `top` to `low`, multiplied by a factor that rises
# linearly from 0 to 1 over the first fraction `warmup` of the run. `progress` runs from 0 to 1. Compare it with
# `loop.learning_rate(config, progress)`, for a configuration with `warmup` set by `apply` as above.
# ```

# %% [markdown]
# ```{solution-start} ex-finetuning-warmup
# :class: dropdown
# ```


# %%
def rate(progress, top, low, warmup):
    cosine = low + (top - low) * (1 + np.cos(np.pi * progress)) / 2
    return cosine * min(1, progress / warmup)


slow = apply(config, {"warmup": 0.1}, "this exercise")
when = np.linspace(0, 0.99, 12)
mine = [rate(t, slow.lr, slow.min_lr, 0.1) for t in when]
assert np.allclose(mine, [loop.learning_rate(slow, t) for t in when])

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} Large batches on a small card
# :label: ex-finetuning-accumulate
# A batch of four does not fit into memory. Compute the gradient of `losses.dice_focal_loss` for it from two batches
# of two, and show that it is the same. What kind of layer in the model would make it differ? Use the 64 px corners of
# `images` again.
# ```

# %% [markdown]
# ```{solution-start} ex-finetuning-accumulate
# :class: dropdown
# ```

# %%
x, y = images[..., :64, :64], targets[:, :1, :64, :64]


def gradient(parts):
    model.zero_grad()
    for part in parts:
        loss = losses.dice_focal_loss(model(x[part])[:, :1], y[part])
        (loss / len(parts)).backward()  # adds to what is there
    return torch.cat([p.grad.flatten() for p in free if p.grad is not None])


whole = gradient([slice(0, 4)])
halves = gradient([slice(0, 2), slice(2, 4)])
assert torch.allclose(whole, halves, atol=1e-4 * whole.abs().max().item())

# %% [markdown]
# The gradients agree, because the losses are means over images and the head's {term}`GroupNorm` normalises each image
# by itself. A BatchNorm in training mode would make them differ, because the statistics of two images are not those
# of four.
#
# ```{solution-end}
# ```

# %% [markdown]
# ## Further reading
#
# - {cite:t}`lin2017focal` on focal loss, {cite:t}`milletari2016vnet` on the Dice loss.
# - {cite:t}`loshchilov2017sgdr` on cosine schedules and restarts.
# - {cite:t}`kirillov2019panoptic` on PQ, {cite:t}`kumar2017aji` on AJI.
