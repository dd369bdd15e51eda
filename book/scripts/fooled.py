# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Six ways to fool oneself
#
# A score that looks like a record may be a mistake. Here are six common mistakes, all on the same ten images: three in
# how a score is computed, two in how a model is trained, and one in how it is chosen. Each takes one line.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to recognise six mistakes by what they print, and to write the test that finds each of them.
#
# **You need**: [Fine-tuning](finetuning.ipynb) for the scores, [Cross-validation](crossvalidation.ipynb) for the folds.
# **Time**: 20 minutes to read, half a minute to run.
# ```

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from torch import nn
from torch.nn import functional as F

from nucseg.config import ModelConfig
from nucseg.data.synth import Synthetic
from nucseg.metrics import score
from nucseg.model import lora
from nucseg.model.bases import load_base
from nucseg.model.network import build_model
from nucseg.model.sam import PIXEL_MEAN, PIXEL_STD
from nucseg.records.provenance import provenance_note
from nucseg.records.quotes import check
from nucseg.viz import figures
from nucseg.viz.chapters import fooled

figures.use_style()
TISSUES = (
    "human testis", "human jejunum", "human kidney", "human melanoma",
    "human pancreas", "human spleen", "human tonsile", "mouse kidney",
    "mouse spleen", "mouse thymus",
)  # fmt: skip
dataset = Synthetic(n_per_tissue=1, size=256, seed=3, tissues=TISSUES)
samples = list(dataset)

# %%
Markdown(provenance_note(dataset))

# %% [markdown]
# ## One set of predictions, with known errors
#
# So that the truth is certain, the predictions are made from it. In ten images of synthetic tissue each
# {term}`nucleus <nucleus instance>` is missed with a probability of 15%, or moved by up to three pixels; a neighbour within three pixels is merged
# with it with a probability of 70%.

# %%
rng = np.random.default_rng(0)
errors = {"missed": 0.15, "merged": 0.7}  # probabilities
predictions = [fooled.disturb(s.labels, rng, **errors, shift=3) for s in samples]
pairs = [(s.labels, p) for s, p in zip(samples, predictions, strict=True)]
true = pd.DataFrame([vars(score(*pair)) for pair in pairs])
scores = true[["dice", "iou", "aji", "pq"]].mean()
names = {"dice": "Dice", "iou": "IoU", "aji": "AJI", "pq": "PQ", "rq": "RQ"}
scores.rename(names).to_frame("true score").style.format("{:.3f}")

# %% mystnb={"figure": {"caption": "One of the ten images, its prediction, and the errors (grey: found, vermilion: missed, blue lines: spurious). The scale bar assumes 0.25 µm per pixel.", "name": "fig-fooled-prediction"}, "image": {"alt": "Three panels of synthetic tissue: with true outlines, with the outlines of the prediction, which merges some neighbours and lacks some nuclei, and the map of errors."}}
fooled.plot_prediction(samples[2], predictions[2])
plt.show()

# %% [markdown]
# The true scores of these predictions are {term}`Dice <Dice coefficient>` 0.828, {term}`AJI <aggregated Jaccard index>`
# 0.511 and
# {term}`PQ <panoptic quality>` 0.548. The next three sections score the same predictions.

# %% tags=["hide-input"]
check("0.828", true["dice"].mean())
check("0.511", true["aji"].mean())
check("0.548", true["pq"].mean())
check("15%", errors["missed"])
check("70%", errors["merged"])
missed_share = 1 - true["nuclei_predicted"].sum() / true["nuclei_true"].sum()
assert missed_share > 0.15, "neither missed nor merged"
seen = {}  # what each mistake prints, beside the truth

# %% [markdown]
# (fooled-binary)=
# ## Binary masks into AJI and PQ
#
# AJI and PQ compare objects, so they need a {term}`label map`. A thresholded mask has the same shape and type, and both
# scores accept it: as an image with one single nucleus.

# %%
binary = pd.DataFrame(
    [vars(score((t > 0).astype(int), (p > 0).astype(int))) for t, p in pairs]
)
both = pd.DataFrame({"printed": binary.mean(), "true": true.mean()})
both.loc[list(names)].rename(names).style.format("{:.3f}")

# %% [markdown]
# This prints an AJI of 0.708 and a PQ of 0.708; the true ones are 0.511 and 0.548. Both have become the
# {term}`IoU <intersection over union>` of the {term}`foreground`, and whether nuclei were told apart no longer counts.
#
# **How to notice:** AJI equals IoU in every image, RQ is 1, and there is one nucleus in each image:

# %%
same = (binary["aji"] == binary["iou"]).all()
print("AJI equals IoU:", same)
print("RQ:", set(binary["rq"]), "nuclei:", set(binary["nuclei_true"]))
print("true nuclei:", true["nuclei_true"].tolist())

# %% tags=["hide-input"]
seen["binary masks: AJI"] = binary["aji"].mean(), true["aji"].mean()
seen["binary masks: PQ"] = binary["pq"].mean(), true["pq"].mean()
check("0.708", binary["aji"].mean())
check("0.708", binary["pq"].mean())
check("0.511", true["aji"].mean())
check("0.548", true["pq"].mean())
assert same and set(binary["rq"]) == {1.0} and set(binary["nuclei_true"]) == {1}
assert (true["nuclei_true"] > 1).all(), (
    "an image with a single nucleus shows nothing"
)

# %% [markdown]
# (fooled-background)=
# ## Dice averaged with the background
#
# Libraries for semantic segmentation often average a score over the classes, and background is a class. In images of
# nuclei it is the larger and the easier class:


# %%
def dice(a, b):
    """Dice of two boolean masks."""
    return 2 * (a & b).sum() / (a.sum() + b.sum())


by_class = pd.DataFrame(
    [
        {"nuclei": dice(t > 0, p > 0), "background": dice(t == 0, p == 0)}
        for t, p in pairs
    ]
)
means = by_class.mean()
print(means.round(3).to_dict(), "mean:", means.mean().round(3))

# %% [markdown]
# This prints 0.878 where Dice is 0.828. The fewer nuclei an image has, the larger the gain.
#
# **How to notice:** score a prediction that finds nothing. It must get 0:

# %%
nothing = [(dice(t > 0, t < 0) + dice(t == 0, t >= 0)) / 2 for t, _ in pairs]
dice_of_nothing = score(pairs[0][0], np.zeros_like(pairs[0][0])).dice
print("with background:", np.mean(nothing).round(3), "Dice:", dice_of_nothing)

# %% [markdown]
# With the background it gets 0.405. The same test finds accuracy over pixels, and every other score that counts what is
# easy.

# %% tags=["hide-input"]
with_background = by_class.mean(axis=1).mean()
seen["Dice with background"] = with_background, true["dice"].mean()
check("0.878", with_background)
check("0.828", true["dice"].mean())
assert np.allclose(by_class["nuclei"], true["dice"]), "two ways to the same Dice"
check("0.405", np.mean(nothing))
assert dice_of_nothing == 0

# %% [markdown]
# (fooled-matched)=
# ## AJI over matched nuclei only
#
# AJI matches each true nucleus with a prediction and sums over the matches. It is easy to forget that the areas of
# unmatched objects belong to the denominator as well. Here is the sum without the missed nuclei, from a table of shared
# pixels:


# %%
def matched_only(truth, prediction):
    """AJI without the area of missed nuclei; the largest IoU is matched first."""
    table = np.histogram2d(
        truth.ravel(),
        prediction.ravel(),
        (range(truth.max() + 2), range(prediction.max() + 2)),
    )[0]
    shared = table[1:, 1:]
    union = table.sum(axis=1)[1:, None] + table.sum(axis=0)[None, 1:] - shared
    iou, both, either, used = shared / np.maximum(union, 1), 0, 0, set()
    while iou.max() > 0:
        i, j = np.unravel_index(iou.argmax(), iou.shape)
        both, either, used = both + shared[i, j], either + union[i, j], used | {j}
        iou[i], iou[:, j] = 0, 0
    areas = table.sum(axis=0)[1:]
    spurious = areas.sum() - sum(areas[j] for j in used)
    return both / (either + spurious)  # the mistake: missed nuclei are not added


lenient = np.mean([matched_only(*pair) for pair in pairs])
print("matched only:", lenient.round(3), "AJI:", true["aji"].mean().round(3))

# %% [markdown]
# This prints 0.702 where AJI is 0.511. `nucseg.metrics` has this sum under the name `aji_matched_only`, so that
# published scores of this kind can be compared with their own kind.
#
# **How to notice:** the AJI of an image cannot exceed the IoU of its foreground, and deleting nuclei from a perfect
# prediction must cost something:

# %%
truth = pairs[2][0]
half = np.where(truth % 2, truth, 0)  # every second nucleus
above = true["aji_matched_only"] > true["iou"]
print(
    "without half of the nuclei:",
    matched_only(truth, half),
    "instead of",
    round(score(truth, half).aji, 3),
)
print("images with an AJI above the IoU:", above.sum(), "of", len(above))

# %% tags=["hide-input"]
seen["AJI, matched only"] = lenient, true["aji"].mean()
check("0.702", lenient)
check("0.511", true["aji"].mean())
assert abs(lenient - true["aji_matched_only"].mean()) < 0.005, "two matchings"
assert matched_only(truth, half) == 1 > score(truth, half).aji
assert above.any(), "no image breaks the bound"
assert (true["aji"] <= true["iou"]).all(), "the true AJI breaks its bound"

# %% [markdown]
# (fooled-carried)=
# ## Weights carried over from fold to fold
#
# In {term}`cross-validation` each {term}`fold` needs a new model. If it is made before the loop, fold 2 goes on with
# weights that have already been trained on its test images. To see it, a small network decides for single pixels, from
# the seven by seven pixels around them, whether they lie in a nucleus. Two of the ten images are tested in each fold:

# %%
rng = np.random.default_rng(0)
data = [
    tuple(torch.from_numpy(part) for part in fooled.pixels(sample, 60, rng))
    for sample in samples
]


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(147, 64), nn.ReLU(), nn.Linear(64, 1)).double()


def joined(which):
    return [torch.cat([data[i][part] for i in which]) for part in (0, 1)]


def fit(model, which, steps=100):
    x, y = joined(which)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
        optimiser.step()


def tested(model, which):
    x, y = joined(which)
    return float(dice((model(x)[:, 0] > 0).numpy(), y.numpy() > 0))


# %% [markdown]
# The mistake is the place of one line:

# %%
carried = new_model()  # the mistake: made once, before the loop
rows = {}
for fold in range(5):
    test = [2 * fold, 2 * fold + 1]
    train = [i for i in range(10) if i not in test]
    model = new_model()  # right: new weights in every fold
    fit(model, train)
    fit(carried, train)
    rows[fold + 1] = {
        "new weights": tested(model, test),
        "carried over": tested(carried, test),
    }
folds = pd.DataFrame(rows).T

# %% mystnb={"figure": {"caption": "Test Dice of each fold, with new weights in every fold and with weights carried over.", "name": "fig-fooled-folds"}, "image": {"alt": "Two lines over five folds. They start at the same point in fold 1. With new weights the Dice goes up and down; with weights carried over it is higher in every later fold, by most in the last two, where it reaches 1."}}
fooled.plot_folds(folds)
plt.show()

# %% [markdown]
# This prints a mean Dice of 0.92; with new weights it is 0.86. How large the gain is depends on how well the model
# remembers: this one has nearly ten thousand weights for 480 pixels. A short training may gain nothing; it is a mistake
# all the same.
#
# **How to notice:** the first fold is right, and the gain sits in the later ones. Change the order of the folds: a gain
# that moves with the place and not with the images is this mistake. And compare the weights at the start of each fold:


# %%
def fingerprint(model):
    """A number that changes with any weight."""
    return sum(float(p.detach().abs().sum()) for p in model.parameters())


start = fingerprint(new_model())
print("new models are alike:", fingerprint(new_model()) == start)
print("the carried one is as new:", fingerprint(carried) == start)

# %% tags=["hide-input"]
seen["weights carried over: Dice"] = (
    folds["carried over"].mean(),
    folds["new weights"].mean(),
)
check("0.92", folds["carried over"].mean())
check("0.86", folds["new weights"].mean())
assert folds.loc[1, "carried over"] == folds.loc[1, "new weights"], "fold 1 differs"
assert (folds.loc[2:, "carried over"] > folds.loc[2:, "new weights"]).all()
assert sum(p.numel() for p in new_model().parameters()) // 1000 == 9
assert 8 * 60 == 480

# %% [markdown]
# (fooled-no-grad)=
# ## LoRA under no_grad
#
# "The {term}`encoder` is frozen", so its forward pass is put under `torch.no_grad()` to save memory. With {term}`LoRA`
# in it this also cuts off the only weights of the encoder that should learn. The loss falls all the same, because the
# {term}`head` learns:

# %%
base = load_base("random", seed=0)
config = ModelConfig(base="random", size=128, rank=8, dropout=0.0)
image = torch.from_numpy(samples[2].image[:128, :128]).permute(2, 0, 1)[None]
mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (PIXEL_MEAN, PIXEL_STD))
x = (image.float() - mean) / std
target = torch.from_numpy(samples[2].labels[:128, :128] > 0)[None, None].float()


def train(with_gradients, steps=5):
    """Losses of a few steps, and the trained model."""
    torch.manual_seed(0)
    model = build_model(config, base).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(learning, lr=3e-3), []
    for _ in range(steps):
        with torch.set_grad_enabled(with_gradients):  # the mistake: False
            features = model.encoder.features(x)
        logits = F.interpolate(
            model.head((x, *features)), size=(128, 128), mode="bilinear"
        )
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, model


runs = {"under no_grad": train(False), "with gradients": train(True)}

# %% [markdown]
# What is usually printed does not show it. The number of weights with `requires_grad` is the same, and both losses
# fall. But not the same weights moved:

# %%
report = {}
for name, (losses, model) in runs.items():
    layers = lora.lora_layers(model).values()
    report[name] = {
        "weights to train": sum(
            p.numel() for p in model.parameters() if p.requires_grad
        ),
        "loss": f"{losses[0]:.2f} to {losses[-1]:.2f}",
        "LoRA layers that moved": sum(bool(layer.lora_B.any()) for layer in layers),
    }
pd.DataFrame(report).T.style.format("{:,}", subset=["weights to train"])

# %% [markdown]
# This prints 237,825 trained weights; in fact 257 learn, those of the head. The model is a linear classifier on
# the features of a frozen encoder, and its scores say nothing about LoRA.
#
# **How to notice:** after one backward pass every weight that should learn must have a gradient.


# %%
def without_gradient(model):
    """The weights that should learn and got no gradient."""
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is None
    ]


{name: len(without_gradient(model)) for name, (_, model) in runs.items()}

# %% tags=["hide-input"]
(frozen_losses, frozen), (good_losses, good) = runs.values()
check("237,825", report["under no_grad"]["weights to train"])
assert report["with gradients"]["weights to train"] == 237_825
assert sum(p.numel() for p in frozen.head.parameters()) == 257
assert frozen_losses[-1] < frozen_losses[0] and good_losses[-1] < good_losses[0]
layers = len(lora.lora_layers(good))
assert report["under no_grad"]["LoRA layers that moved"] == 0, (
    "LoRA learned under no_grad"
)
assert report["with gradients"]["LoRA layers that moved"] == layers
assert len(without_gradient(frozen)) == 2 * layers and not without_gradient(good)

# %% [markdown]
# (fooled-chosen)=
# ## Choosing on the test part
#
# A run is repeated, an epoch picked, a threshold tuned, and each time the {term}`test part` is scored. The best value
# is reported. To see what this alone is worth, we make twenty candidates that are equally good: they differ by chance
# only. Five images test them; the other five are the {term}`validation part`.


# %%
def candidate(seed):
    """PQ of one candidate on the ten images, with errors drawn anew."""
    rng = np.random.default_rng(seed)
    drawn = [fooled.disturb(s.labels, rng, **errors) for s in samples]
    return [score(s.labels, p).pq for s, p in zip(samples, drawn, strict=True)]


pq = np.array([candidate(seed) for seed in range(1, 21)])  # candidate, image
on_test, on_val = pq[:, ::2].mean(axis=1), pq[:, 1::2].mean(axis=1)
pd.Series(
    {
        "best on the test part": on_test.max(),
        "chosen on validation, then tested": on_test[on_val.argmax()],
        "mean of all candidates": on_test.mean(),
    }
).to_frame("test PQ").style.format("{:.3f}")

# %% [markdown]
# This prints 0.608. Every candidate has the same error rates, so the true value is their mean, 0.560, and the gain of
# 0.048 is luck. The candidate that is chosen on validation images has 0.586 on the test part. With another draw it
# could as well be below the mean: this choice is not biased to one side.
#
# **How to notice:** count how many numbers were looked at before one was reported. The gain grows with this number and
# shrinks with the number of test images:

# %%
rng = np.random.default_rng(0)
for tries in (1, 5, 20):
    best = [rng.choice(on_test, tries, replace=False).max() for _ in range(500)]
    print(f"best of {tries}: +{np.mean(best) - on_test.mean():.3f}")

# %% tags=["hide-input"]
seen["best of 20 on the test part: PQ"] = on_test.max(), on_test.mean()
check("0.608", on_test.max())
check("0.560", on_test.mean())
check("0.048", on_test.max() - on_test.mean())
check("0.586", on_test[on_val.argmax()])
assert len(pq) == 20 and on_test.max() > on_test[on_val.argmax()]

# %% [markdown]
# ## All of them
#
# Here is what the mistakes print, beside the truth. Binary masks have two rows, one for each score; LoRA under
# `no_grad` has none, because it prints a wrong number of weights and not a wrong score.

# %% mystnb={"figure": {"caption": "What each mistake prints, and the true value of the same predictions or models.", "name": "fig-fooled-printed"}, "image": {"alt": "Six rows with two marks each, the true score and the printed one. Binary masks and the AJI over matched nuclei add most, about a fifth of the scale; carried weights, choosing on the test part and Dice with background add about a quarter of that."}}
table = pd.DataFrame(seen, index=["printed", "true"]).T
fooled.plot_printed(table)
plt.show()

# %%
table.assign(gain=table["printed"] - table["true"]).style.format("{:.3f}")

# %% [markdown]
# How `nucseg` guards against them: every row of `scores.csv` has the number of nuclei in truth and prediction; Dice is
# of the foreground; AJI has a test with missed nuclei; every {term}`run` builds its model anew and records the hash of
# its split; the tests check which weights a training step changes; and the epoch is chosen on the validation part.

# %% tags=["hide-input"]
gain = table["printed"] - table["true"]
assert (gain > 0).all() and len(gain) == 6, "a mistake that costs"
assert gain.max() < 0.25 and gain["Dice with background"] < 0.06

# %% [markdown]
# ## Summary
#
# - Score what must be 0 and what must be 1 before scoring a model: nothing, the truth, and the truth without some nuclei.
# - Look at the number of nuclei beside every AJI and PQ.
# - Assert ties: AJI at most IoU, one model per fold with the same weights at its start, a gradient for all that learns.
# - Look at the test part once. If it was looked at more often, say how often.
# - When a score jumps, look for a mistake first.
#
# ## Exercises

# %% [markdown]
# ```{exercise} Which mistake?
# :label: ex-fooled-which
# A table has the same value for AJI, PQ and IoU in every row. What happened?
# ```

# %% [markdown]
# ```{solution} ex-fooled-which
# :class: dropdown
# Binary masks were given to AJI and PQ. With one object in truth and in prediction, both are the IoU of the foreground
# (PQ if it is above one half, else 0).
# ```

# %% [markdown]
# ```{exercise} Does the loss show it?
# :label: ex-fooled-loss
# Training loss and validation Dice improve over the epochs. Which of the six mistakes does this rule out?
# ```

# %% [markdown]
# ```{solution} ex-fooled-loss
# :class: dropdown
# None. With LoRA under `no_grad` the head still learns; with weights carried over the loss starts low and falls
# further; and the others do not touch the training at all.
# ```

# %% [markdown]
# ```{exercise} Accuracy
# :label: ex-fooled-accuracy
# Compute the share of pixels that are classified correctly, for the predictions and for a prediction that finds
# nothing.
# ```

# %% [markdown]
# ```{solution-start} ex-fooled-accuracy
# :class: dropdown
# ```

# %%
accuracy = np.mean([((t > 0) == (p > 0)).mean() for t, p in pairs])
empty = np.mean([(t == 0).mean() for t, _ in pairs])
print(f"{accuracy:.3f}; finding nothing: {empty:.3f}")
assert empty > 0.5  # more than half of the pixels are background

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} The order of the folds
# :label: ex-fooled-order
# Run the folds in reverse order with weights carried over. Which fold is right now?
# ```

# %% [markdown]
# ```{solution-start} ex-fooled-order
# :class: dropdown
# ```

# %%
model, backwards = new_model(), {}
for fold in range(5, 0, -1):
    test = [2 * fold - 2, 2 * fold - 1]
    fit(model, [i for i in range(10) if i not in test], steps=50)  # half, for speed
    backwards[fold] = tested(model, test)
print(backwards)  # fold 5 is right now, and fold 1, the last to run, is too good
assert backwards[1] > folds.loc[1, "carried over"]

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} How many looks?
# :label: ex-fooled-looks
# With twice as many test images, what is left of the gain of the best of twenty? Use all ten images of `pq` as the test
# part.
# ```

# %% [markdown]
# ```{solution-start} ex-fooled-looks
# :class: dropdown
# ```

# %%
on_ten = pq.mean(axis=1)
gains = [scores.max() - scores.mean() for scores in (on_ten, on_test)]
print(f"+{gains[0]:.3f} instead of +{gains[1]:.3f}")
assert gains[0] < gains[1]

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ## Further reading
#
# - {cite:t}`kumar2017aji` define AJI, {cite:t}`kirillov2019panoptic` PQ.
# - {cite:t}`mahbod2024nuinsseg` give scores on NuInsSeg that newer ones can be held against.
