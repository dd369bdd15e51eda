# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Fine-tuning
#
# This chapter trains. It builds the loss and the training step by hand, compares both with the package's, and then
# trains a small model on a CPU in about a minute: you see the loss fall, the checkpoint chosen, and the same image
# before and after. A recorded run on the real NuInsSeg images shows what training costs, and the last section has the
# commands for a GPU.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to write a Dice and a focal loss, to write a training step that changes only what it should, to
# read learning curves, and to turn predicted maps into nuclei and scores.
#
# **You need** {doc}`lora`, and {doc}`data` for the target maps. No download and no GPU: the images are made by code, or
# cut from NuInsSeg where `NUCSEG_DATA` names its folder.
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
from nucseg.viz.chapters.finetuning import (
    config_table,
    costs_table,
    plot_batch,
    plot_before_after,
    plot_learning_rates,
    plot_losses,
    plot_maps,
    scores_table,
)
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
# The model is described by one flat configuration, of which more below. Its {term}`base` is `offline`, which comes with
# nucseg: MobileSAM's encoder, trained from random weights for 42 minutes on synthetic tissue and on BBBC038
# {cite}`caicedo2019bbbc038`. It is not MobileSAM's checkpoint. The six kinds of tissue on this page were kept out of
# its training.

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
# Nuclei cover a small part of most images. A loss that counts pixels is content when it predicts background. The report
# uses two losses that are not, half and half:
#
# $$
# L = \frac{D + F}{2}, \qquad
# D = 1 - \frac{2 \sum p\,t + 1}{\sum p + \sum t + 1}, \qquad
# F = \frac{1}{N} \sum \alpha_t (1 - p_t)^{\gamma} (-\log p_t)
# $$
#
# with sums over the $N$ pixels, the predicted probability $p$, the truth $t$, and $p_t = p$ on nuclei and $1 - p$
# elsewhere. The weight $\alpha_t$ is 0.25 on nuclei and 0.75 elsewhere, and $\gamma = 2$. The soft {term}`Dice loss`
# {cite}`milletari2016vnet` compares areas. {term}`Focal loss <focal loss>` {cite}`lin2017focal` is a cross-entropy that
# plays down pixels which are right already. In code:


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
# The package's losses give the same numbers for an image:

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
# Two details differ. With several images, the package's Dice loss is computed per image and then averaged, so that an
# image with few nuclei counts as much as a crowded one. And the package never takes the logarithm of a probability.
# Where the network is very sure and wrong, the probability of the true class rounds to 0, and our line gives infinity:

# %%
sure, nucleus = torch.tensor([[-200.0]]), torch.ones(1, 1)
focal(sure, nucleus), losses.focal_loss(sure, nucleus)

# %%
listing(losses.focal_loss)

# %% mystnb={"image": {"alt": "Two line charts. Left: over the share of an image that is nuclei, the Dice loss of an all-background prediction stays near one while its cross-entropy falls to zero. Right: focal loss lies below cross-entropy and is nearly zero where the probability of the true class is above one half."}, "figure": {"caption": "Left: what a prediction of nothing but background costs, when nuclei cover a given share of the image. Cross-entropy lets it pass where nuclei are few, Dice does not. Right: focal loss beside cross-entropy, over the probability given to the true class.", "name": "fig-losses"}}
plot_losses()
plt.show()

# %% [markdown]
# The {term}`instance head` of this chapter predicts a second map, the {term}`distance map`, and its loss has a second
# term: the cross-entropy of that map, which is least where the prediction equals the target. So a training loss of this
# head and one of the report's are not of the same quantity.

# %% tags=["hide-input"]
check("0.75", 1 - config.focal_alpha)
assert config.focal_alpha == 0.25 and config.focal_gamma == 2, "0.25, and gamma 2"
assert torch.isinf(focal(sure, nucleus)), "our line gives infinity"
assert torch.isfinite(losses.focal_loss(sure, nucleus)), "the package's does not"

# %% [markdown]
# ## A batch
#
# The network learns from images and {term}`target maps`. Each image is changed a little at random first, by flips,
# rotations, and shifts of its stain, so that the network never sees the same pixels twice. The label map turns with its
# image, and is encoded afterwards:


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

# %% mystnb={"image": {"alt": "A grid of three rows and four columns. Four images of stained tissue; below each its foreground, white on black; below that its distance map, in which touching nuclei are separated by dark lines."}, "figure": {"caption": "One batch: four augmented images, and the two target maps of each.", "name": "fig-batch"}}
plot_batch(images, targets)
plt.show()

# %% [markdown]
# The dataset was split once: into images to train on, images to choose the {term}`checkpoint` with, and images to score
# at the end. No choice is ever made on the last part.

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
# One step predicts, compares, and moves the weights that may move. Everything else is frozen, so the optimiser does not
# even know it:

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
# Before a long run, it pays to check that a model can learn a single batch by heart. If it cannot, something is broken:
# the loss, the targets, or what is frozen.

# %%
by_heart = [step(images, targets) for _ in range(6)]
assert by_heart[-1] < 0.9 * by_heart[0]
[round(value, 3) for value in by_heart]

# %% [markdown]
# The package's loop does the same for every batch of an epoch. What it adds: a learning rate that falls during the run,
# a stop when the loss is no longer finite, and the options that this page does not use (a moving average of the
# weights, 16-bit arithmetic on a GPU).

# %%
listing(loop.train_epoch)

# %% [markdown]
# ## One configuration, one run
#
# A {term}`run` is described by one flat configuration. Every field has a default with a reason, and a *preset* lists
# only what differs. This page uses the preset `quick`, on 20 training and 6 test images; the report's system is the
# preset `report`. They differ in:

# %%
config_table(config, preset("report"), ("this page", "report"))

# %% [markdown]
# LoRA and head together train 412,146 of 10,542,238 parameters, 3.91%:

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
# {term}`test part`. Had it been stopped half way, the same call would resume after the last whole epoch and give the
# same numbers: everything random is drawn from the {term}`seed`, the epoch and the image.

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
# Read the curves together. The training loss falls as long as anything is learnt, right or wrong. The validation scores
# say whether it helps on other images. When they stop rising while the loss still falls, the model learns its training
# images by heart.

# %%
before = evaluate(untrained, dataset, split.val, progress=False)["pq"].mean()
best = history["val_pq"].max()
pd.Series(
    {"before training": before, "best epoch": best}, name="validation PQ"
).to_frame()

# %% tags=["hide-input"]
assert best > before, "training helps on the validation part"
assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0], (
    "the loss falls"
)

# %% [markdown]
# ## From maps to nuclei
#
# The network predicts maps. `predict` gives them as probabilities, and `labels_from` decodes them into a
# {term}`label map`: the foreground above one half, cut along the valleys of the distance map. We take the test image
# whose PQ is in the middle.

# %%
trained = load_model(folder / "best.safetensors")
middle = scores.sort_values("pq", ignore_index=True).iloc[len(scores) // 2]
index = int(np.flatnonzero(dataset.table["stem"] == middle["stem"])[0])
sample = dataset[index]
maps = predict(trained, sample.image)
after = labels_from(maps)
maps.shape, after.max()

# %% mystnb={"image": {"alt": "Four panels of one test image: the image, the predicted foreground, the predicted distance map, and the image with the outlines decoded from the two maps."}, "figure": {"caption": "A test image, the two maps predicted for it, and the label map decoded from them.", "name": "fig-maps"}}
plot_maps(sample, maps, after)
plt.show()

# %% [markdown]
# Before training LoRA adds nothing ($B = 0$) and the head is random, so its maps mean nothing:

# %% mystnb={"image": {"alt": "Four panels of one H and E image: the image with its true outlines, the prediction before training, the prediction after training, and a map of its errors."}, "figure": {"caption": "The same test image with its true outlines, the outlines predicted before and after training, and the errors after. The scale bar assumes 0.25 µm per pixel.", "name": "fig-before-after"}}
plot_before_after(sample, labels_from(predict(untrained, sample.image)), after)
plt.show()

# %% [markdown]
# ## What the scores say
#
# Dice and IoU compare foregrounds. AJI and PQ compare nuclei, and are what instance segmentation is about. With the
# true nuclei $T_i$ and the predicted ones $P_j$:
#
# | score | what it is |
# | --- | --- |
# | {term}`Dice <dice coefficient>` | $2 \lvert T \cap P \rvert / (\lvert T \rvert + \lvert P \rvert)$ of the two foregrounds |
# | {term}`IoU <intersection over union>` | $\lvert T \cap P \rvert / \lvert T \cup P \rvert$ of the two foregrounds |
# | {term}`SQ <segmentation quality>` | mean IoU of the {term}`true positives <true positive>`, the pairs $T_i, P_j$ with an IoU above 0.5 |
# | {term}`RQ <recognition quality>` | TP / (TP + FP/2 + FN/2), an F1 score of these pairs |
# | {term}`PQ <panoptic quality>` | SQ times RQ {cite}`kirillov2019panoptic` |
# | {term}`AJI <aggregated jaccard index>` | each $T_i$ takes the $P_j$ of the highest IoU; the pixels that the pairs share, over their unions and all $P_j$ that none took {cite}`kumar2017aji` |
# | AJI+ | the same, but a $P_j$ can be taken only once {cite}`graham2019hovernet` |
# | AJI, matched only | AJI+ that forgives missed nuclei, as the report's code computes it; for comparison alone |
#
# Each is 1 for a perfect label map. How far they can lie apart shows in the smallest example: two equal nuclei that
# touch, found as one object.

# %%
two = np.zeros((20, 30), int)
two[5:15, 5:15], two[5:15, 15:25] = 1, 2
fused = score(two, (two > 0).astype(int))
{
    name: round(getattr(fused, name), 3)
    for name in ("dice", "iou", "aji", "aji_plus", "pq")
}

# %% [markdown]
# A perfect foreground, Dice 1, and not one nucleus found, PQ 0. Now the live run:

# %%
scores_table({f"{len(scores)} test images": scores})

# %% [markdown]
# Each value is the mean over images, with a {term}`bootstrap` interval over them: wide, as it should be for so few.

# %% tags=["hide-input"]
assert fused.dice == 1 and fused.pq == 0, "Dice 1 and PQ 0"

# %% [markdown]
# ## The learning rate
#
# AdamW's rate follows half a cosine down to nearly zero {cite}`loshchilov2017sgdr`. The report speaks of *warm
# restarts*; its code runs a single cycle. Both are one number here, `cycles`.

# %% mystnb={"image": {"alt": "Line chart of the learning rate over training: one cycle falls from the full rate to nearly zero once; two cycles do so twice, with a jump back in the middle."}, "figure": {"caption": "The learning rate of the preset report, as the report's code runs it (one cycle) and as its text says (here with two).", "name": "fig-learning-rate"}}
once, twice = (apply(preset("report"), {"cycles": n}, "this page") for n in (1, 2))
plot_learning_rates({"one cycle": once, "two cycles": twice})
plt.show()

# %% [markdown]
# ## Recorded runs on NuInsSeg
#
# The same loop ran on the real images, on fold 1 of the benchmark. What it left behind is in the repository under
# `results/`: `history.csv` with one row per epoch, `scores.csv` with one row per test image, and `run.json`, which says
# from what. `read_run` has read two such folders above, as `instance` and `design`:

# %%
instance.history.tail(2).round(3)

# %% [markdown]
# The first has the instance head on the base `offline` and trained for 10 epochs on one crop of each of the 452
# training images. It took 17 minutes on one CPU thread.

# %% mystnb={"image": {"alt": "Two charts over the epochs of the recorded run on NuInsSeg: training loss and validation scores, with a line at the epoch that was kept."}, "figure": {"caption": "The recorded run of the instance head: fold 1 of the benchmark's five, base offline, one seed.", "name": "fig-recorded-curves"}}
figures.learning_curves(instance.history, monitor="pq")
plt.show()

# %% [markdown]
# The second is the report's design, its LoRA, head and loss, without any pretraining: 14 epochs from random weights,
# where the report has 50 from MobileSAM's. So it says what this design learns in 53 minutes on a CPU, and nothing about
# the report's own scores. Two differences from the report's code, {doc}`images normalised twice and a BatchNorm that
# drifts
# <claims>`, are left out.

# %%
scores_table({"instance head": instance.scores, "report's design": design.scores})

# %% [markdown]
# The report's design reaches a Dice of 0.684 and a PQ of 0.242: the foreground is roughly found, and the nuclei in it
# are not told apart. The images hold 53 nuclei on average, the predictions 34 objects. The instance head reaches 0.787
# and 0.463, with 51 objects. (Published U-Nets have a Dice of 0.766 to 0.814.) The two runs differ in base, head and
# budget; {doc}`beyond` changes one thing at a time.

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
# LoRA trains few weights. Does it also train faster? A benchmark timed the same step, a batch of four crops of 256 px,
# for several ways to train, on an otherwise idle CPU with two threads:

# %%
costs = pd.read_csv(results / "training-cost" / "costs.csv")
ways = {
    "rank-0": "instance head alone",
    "lora-4": "with LoRA of rank 4",
    "lora-8": "with LoRA of rank 8",
    "full": "with the whole encoder",
    "linear": "report's head, LoRA of rank 8",
}
costs_table(costs, ways)

# %% [markdown]
# Hardly. A step with LoRA of rank 8 takes 0.56 s, only 7% less than the 0.60 s of full fine-tuning, because the
# gradient has to pass through the whole encoder in both. Only leaving the encoder alone is clearly cheaper: 0.38 s. LoRA
# saves memory (here 11%), and above all space on disk: the adapter holds 7% of the weights that full fine-tuning would
# have to store.

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
# The preset `report` as it stands is meant for one GPU: whole images at 1024 px, batches of four, in bfloat16 where the
# card has it. Three commands, the first two once:
#
# ```bash
# nucseg fetch nuinsseg --out data/nuinsseg     # 1.6 GB from Zenodo, verified
# nucseg fetch mobile_sam                       # 41 MB, verified; from then on the default base
# nucseg train --preset report --root data/nuinsseg --fold 1 --out results/report/fold_1
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
# Each recorded run carries the command that repeats it:

# %%
print(instance.about["command"].replace(" --", " \\\n    --"))

# %% [markdown]
# ## Summary
#
# - Dice loss keeps few nuclei from being ignored; focal loss keeps easy pixels from drowning the hard ones.
# - A training step is ten lines: predict, compare, backward, clip, move what may move.
# - The checkpoint is chosen on validation images, never on test images.
# - A good foreground is not yet a good instance segmentation: compare Dice with PQ.
# - LoRA saves weights and memory, but little time: the gradient still passes through the encoder.

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
# The scores of the epochs scatter by chance. The best of 50 is picked partly for its luck on these very images, and
# luck does not carry over to others. A {term}`validation part` takes the luck, and the test part stays untouched.
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
# By $(1 - 0.9)^2 = 0.01$ and by $(1 - 0.5)^2 = 0.25$. The easy pixel is played down 25 times more than the doubtful
# one.
# ```

# %% tags=["hide-input"]
check("0.01", (1 - 0.9) ** 2)

# %% [markdown]
# ```{exercise} What moved?
# :label: ex-finetuning-moved
# Run one step on the corners of `images` and `targets` (64 × 64 px) and list the entries of `model.state_dict()` that
# changed. Do they include anything that you did not expect?
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
# Only LoRA's matrices and the head. The running statistics of the encoder's BatchNorm stay as they were, which the
# chapter on {doc}`lora` explains.
#
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} An image without nuclei
# :label: ex-finetuning-empty
# The Dice loss adds 1 to numerator and denominator. Compute it without, for an image without nuclei, for a prediction
# that is nearly empty and for one that is full. What goes wrong?
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
# Without it, the loss is 1 for the right answer and for the wrong one, and its gradient is zero: such an image teaches
# nothing. With it, the right answer costs nothing.
#
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} A learning rate with warm-up
# :label: ex-finetuning-warmup
# Write `rate(progress, top, low, warmup)`: half a cosine from `top` to `low`, multiplied by a factor that rises from 0
# to 1 over the first `warmup` of the run. Compare it with `loop.learning_rate`.
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
# A batch of four does not fit into memory. Compute its gradient from two batches of two, and show that it is the same.
# When would it not be? Use the 64 px corners of `images` again.
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
# The losses are means over images, and the head's {term}`GroupNorm` looks at one image at a time. With a BatchNorm that
# is trained, the statistics of two images are not those of four, and the gradients differ.
#
# ```{solution-end}
# ```

# %% [markdown]
# ## Further reading
#
# - {cite:t}`lin2017focal` on focal loss, {cite:t}`milletari2016vnet` on the Dice loss.
# - {cite:t}`loshchilov2017sgdr` on cosine schedules and restarts.
# - {cite:t}`kirillov2019panoptic` on PQ, {cite:t}`kumar2017aji` on AJI.
