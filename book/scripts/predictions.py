# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Looking at predictions
#
# Scores measure quality; pictures show the errors. This page follows one image from the network's maps to its nuclei,
# shows images by rank instead of by taste, collects the errors, measures what a change of stain does, and ends with a
# browser in which you set the decoder's parameters yourself.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to decode {term}`target maps` into nuclei step by step, to find mergers and splits, to change the
# amount of a stain in an image, and to report robustness with absolute and relative losses kept apart.
#
# **You need**: the chapter on [fine-tuning](finetuning.ipynb). **Time**: 20 minutes to read and play, 2 minutes to
# run.
# ```
#
# With `NUCSEG_DATA` set to the folder of NuInsSeg, or of its preview, the page shows real test images of the first
# {term}`fold`, segmented by the adapter `nuinsseg-1`, which was not trained on them. Without it the images are
# synthetic tissue of six kinds, and the model is the {term}`base` `offline` with the head it was pretrained with. It
# has seen none of these six kinds, and it was not fine-tuned. The captions say which of the two you see.

# %%
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from scipy import ndimage
from skimage.color import hed_from_rgb, rgb_from_hed
from skimage.segmentation import watershed

from nucseg.config import preset
from nucseg.data import augment
from nucseg.data.datasets import Sample
from nucseg.data.preview import pictures
from nucseg.inference.evaluate import segment_whole
from nucseg.inference.segmenter import load
from nucseg.instances import decode, renumber, split
from nucseg.metrics import errors, score
from nucseg.model.network import build_model, place, predict
from nucseg.records.provenance import provenance_note
from nucseg.records.quotes import check
from nucseg.records.runs import results_folder
from nucseg.records.statistics import difference
from nucseg.training.pretrain import HELD_OUT
from nucseg.viz import figures
from nucseg.viz.chapters import predictions as chapter
from nucseg.viz.widgets import PredictionBrowser, browse, watershed_explorer

figures.use_style()
shown = pictures(n_per_tissue=4, size=320, seed=5, tissues=HELD_OUT)
if shown.real:
    model = load("nuinsseg-1")
    samples = [shown[i] for i in shown.unseen[::2]]
else:
    config = replace(
        preset("instance"), base="offline", lora_target="none", size=320
    )
    model = build_model(config)
    samples = list(shown)
model = place(model, torch.device("cpu"))

# %%
Markdown(provenance_note(shown, model))

# %% [markdown]
# ## From maps to nuclei, step by step
#
# The network returns two maps: the probability that a pixel is {term}`foreground`, and the {term}`distance map`,
# which is high in the middle of a nucleus and low at its outline. Take a square from the image with the most nuclei:

# %%
crowded = max(samples, key=lambda sample: sample.labels.max())
window = np.s_[80:240, 80:240]
maps = predict(model, crowded.image)[(slice(None), *window)]  # (2, 160, 160), 0..1
patch = Sample(
    crowded.image[window],
    renumber(crowded.labels[window], 1),
    crowded.tissue,
    crowded.stem,
)

# %% [markdown]
# Four steps lead to a {term}`label map`:
#
# 1. Pixels with a probability above one half are foreground.
# 2. The distance map is smoothed a little, because noise makes false peaks.
# 3. A {term}`watershed` floods the map upside down, one basin for each peak.
# 4. Two basins become one nucleus if the pass between them, their {term}`ridge`, is higher than 0.9 times the lower
#    of their two peaks. This factor is the decoder's option `ridge`.

# %%
foreground = maps[0] > 0.5
height = ndimage.gaussian_filter(maps[1], sigma=2, truncate=3)
seeds, _ = ndimage.label((height == ndimage.maximum_filter(height, 3)) & foreground)
basins = watershed(-height, seeds, mask=foreground)

peaks = split(height, foreground, ridge=1.0)  # the same in 256 levels
nuclei = renumber(split(height, foreground, ridge=0.9), min_area=50)
assert np.array_equal(
    nuclei, decode(maps, threshold=0.5, ridge=0.9, min_area=50, smooth=2)
)
counts = basins.max(), len(np.unique(peaks)) - 1, nuclei.max()
print("{} basins by hand, {} peaks, {} nuclei".format(*counts))

# %% mystnb={"image": {"alt": "Six panels: a square of tissue with true outlines, the foreground, the smoothed distance map, its peaks and basins, the nuclei after merging, and a curve of the height along a line between two touching nuclei, which dips below a dashed line in the middle."}, "figure": {"caption": "From maps to nuclei. The last panel follows the line drawn between two nuclei that touch: where the height falls below the dashed line, they stay apart. The scale bar assumes 0.25 µm per pixel. Image: {{ tissue }}.", "name": "fig-decoding"}}
chapter.plot_decoding(patch, foreground, height, peaks, nuclei)
plt.show()

# %% [markdown]
# Only the ratio of ridge to peak counts, not the height itself, so the cut does not depend on how confident the
# network is overall. With the option at 1.0 every peak is a nucleus; a low value merges nuclei that touch. Try both
# on the same patch:

# %%
explorer = watershed_explorer(patch, maps, min_area=50)
explorer

# %% [markdown]
# The explorer shows the square of the figure above, whose caption names its source. It works on maps rounded to 256
# levels, so its counts can differ by one or two from those above. In a running notebook, `explorer.live()` offers finer
# steps.

# %% tags=["hide-input"]
from nucseg.instances import RIDGE

check("0.9", RIDGE)
check("1.0", max(ridge for ridge, _ in explorer.states))

# %% [markdown]
# ## Best, middle, worst
#
# Segment all images, rank them by {term}`PQ <panoptic quality>`, and take three by their rank. Then nobody's taste
# decides which images are shown.

# %%
predicted = [segment_whole(model, sample.image) for sample in samples]
scores = pd.DataFrame(
    [asdict(score(s.labels, p)) for s, p in zip(samples, predicted, strict=True)]
)
ranked = scores["pq"].argsort().to_list()  # numbers of the images, worst first
picked = {
    word: (samples[n], predicted[n], scores.loc[n])
    for word, n in zip(
        ("best", "median", "worst"),
        (ranked[-1], ranked[len(ranked) // 2], ranked[0]),
        strict=True,
    )
}

# %% mystnb={"image": {"alt": "Three rows of three panels, for the best, the median and the worst image by PQ: the image with true outlines, with predicted outlines, and a map of found, missed and spurious nuclei."}, "figure": {"caption": "The best, the median and the worst image by PQ: truth, prediction, and errors (grey: found, vermilion: missed, blue lines: spurious). The scale bars assume 0.25 µm per pixel. Images: {{ tissue }}.", "name": "fig-best-worst"}}
chapter.plot_ranked(picked)
plt.show()

# %% [markdown]
# ## A gallery of failures
#
# `nucseg.metrics.errors` lists every nucleus and object of an image by outcome: nuclei found, missed and spurious,
# {term}`mergers <merger>` and {term}`splits <split>`. A merger is a predicted object that matches no nucleus and
# covers more than half of each of several nuclei. A split is the reverse: a nucleus that no object matches, and that
# covers more than half of each of several objects. If a nucleus and an object overlap with an
# {term}`IoU <intersection over union>` of one half or less, the nucleus counts as missed and the object as spurious.

# %%
found = [errors(s.labels, p) for s, p in zip(samples, predicted, strict=True)]
failures = chapter.failures(samples, found, predicted)
failures["kind"].value_counts().to_frame("errors in all images")

# %% mystnb={"image": {"alt": "Four rows of small squares of tissue with true outlines in orange and predicted ones in blue: nuclei merged into one object, nuclei split into several, missed nuclei, and objects where no nucleus is."}, "figure": {"caption": "The largest failures of each kind, at most one per image. Orange: truth; blue: prediction. The scale bar assumes 0.25 µm per pixel. Images: {{ tissue }}.", "name": "fig-gallery"}}
chapter.plot_gallery(failures, samples, predicted)
plt.show()

# %% [markdown]
# The gallery shows the largest failures, not typical ones: it tells you what to look for, and the counts tell you how
# often.
#
# ## Dense and sparse
#
# Where nuclei are crowded, there is more to merge. Merging and splitting both lower
# {term}`AJI <aggregated Jaccard index>` and PQ; neither lowers {term}`Dice <Dice coefficient>`. The table divides the
# images at their median number of nuclei:

# %%
scores["merged"] = [sum(len(ids) for ids in one.mergers.values()) for one in found]
scores["split"] = [len(one.splits) for one in found]
chapter.density_table(scores)

# %% [markdown]
# Compare the two columns: a higher Dice in the dense half can go with a larger share of merged nuclei.

# %% [markdown]
# ## Another stain
#
# Laboratories stain differently, and slides fade. How well a model copes with that can be measured. Light that passes
# through a stain is weakened exponentially, so the amounts of {term}`haematoxylin` (the blue of nuclei) and
# {term}`eosin` (the pink of the rest) add up in {term}`optical density`, the negative logarithm of the transmitted
# light. A matrix separates them {cite}`ruifrok2001quantification`; a third amount, called the rest below, holds what
# the two stains do not explain. Multiplying one amount by a factor then changes one stain alone.


# %%
def restain(image, factors):
    """Multiply the amounts of haematoxylin, eosin and the rest in an RGB image."""
    density = -np.log10(np.maximum(image / 255, 1e-6))  # optical density
    amounts = density @ hed_from_rgb  # (H, W, 3): haematoxylin, eosin, rest
    light = 10 ** -((amounts * factors) @ rgb_from_hed)
    return np.clip(np.rint(255 * light), 0, 255).astype(np.uint8)


same, other = (
    restain(crowded.image, (2, 1, 1)),
    augment.restain(crowded.image, (2, 1, 1)),
)
assert np.abs(same.astype(int) - other).max() <= 1  # the package's own, in float32

# %% mystnb={"image": {"alt": "The same square of tissue six times. In the first row the nuclei go from pale to dark blue with half, the usual and double haematoxylin; in the second row the rest goes from pale to strong pink."}, "figure": {"caption": "One image with half, the usual and double the amount of each stain. The scale bar assumes 0.25 µm per pixel. Image: {{ tissue }}.", "name": "fig-stains"}}
chapter.plot_stains(patch.image, restain)
plt.show()

# %% [markdown]
# Now segment changed images and score them against the same truth. A few images are enough for a first look.

# %%
measured = []
for stain, factors in {"haematoxylin": (1, 0, 0), "eosin": (0, 1, 0)}.items():
    for factor in (0.5, 0.75, 1.0, 1.4, 2.0):
        amounts = 1 + (factor - 1) * np.array(factors)
        for sample in samples[::6]:
            labels = segment_whole(model, restain(sample.image, amounts))
            result = score(sample.labels, labels)
            measured.append((stain, factor, result.dice, result.pq))
measured = pd.DataFrame(measured, columns=["stain", "factor", "dice", "pq"])

# %% mystnb={"image": {"alt": "Two line charts of mean Dice and PQ over the factor by which haematoxylin or eosin is multiplied, from one half to two, with a dotted line at one."}, "figure": {"caption": "Mean Dice and PQ of a few of this page's images when the amount of one stain is multiplied. The dotted line is the unchanged image. Images: {{ tissue }}.", "name": "fig-stain"}}
chapter.plot_stain_curves(measured)
plt.show()

# %% [markdown]
# ## The same on a whole fold
#
# The recorded curve uses all 133 test images of NuInsSeg's first fold and two systems that were trained on the other
# four folds, one training run each: the adapter `nuinsseg-1`, whose training varied the stain at random, and the
# preset `report`, whose training flips and turns images and leaves their colours alone, as the report's does. The
# adapter was trained for ten epochs on 452 images, the preset for three epochs on 200. The two therefore differ in
# head, budget and augmentation, and the report's own model is not among them. The change of PQ is paired, image by
# image.

# %%
shifted = pd.read_csv(results_folder() / "stain" / "scores.csv")
changes = []
for (name, stain, factor), part in shifted[shifted["stain"] != "none"].groupby(
    ["model", "stain", "factor"]
):
    plain = shifted[(shifted["model"] == name) & (shifted["stain"] == "none")]
    row = difference(part, plain, ["pq"]).loc["pq"]  # with its 95% interval
    changes.append(
        {
            "model": name,
            "stain": stain,
            "factor": factor,
            "plain": plain["pq"].mean(),
            **row,
        }
    )
changes = pd.DataFrame(changes)
changes["relative"] = changes["difference"] / changes["plain"]

# %% mystnb={"image": {"alt": "Two line charts of PQ over the factor by which haematoxylin or eosin is multiplied, from one half to two, for two systems, each with a band for its 95 percent interval. Both fall towards half and double haematoxylin; with eosin both are nearly flat."}, "figure": {"caption": "Test PQ on NuInsSeg's first fold when the amount of one stain is multiplied. Bands: 95% interval of the paired change against the unchanged image (images drawn).", "name": "fig-stain-real"}}
chapter.plot_recorded_stain(changes)
plt.show()

# %%
chapter.stain_table(changes)

# %% [markdown]
# The adapter has a PQ of 0.464 on the images as they are, and the preset `report` 0.165. (The adapter is the first
# fold's run of the chapter [Cross-validation](crossvalidation.ipynb), stored in half precision, so that the last
# digit may differ.) So the same absolute loss is a share nearly three times as large for the second system, and which
# one loses less depends on how the loss is counted:
#
# - **Absolute.** With twice the haematoxylin the adapter loses 0.101 and the preset 0.056. Between 0.7 and 1.4 times
#   either stain the adapter loses at most 0.030 and the preset at most 0.038.
# - **Relative.** With twice the haematoxylin that is 22% of the adapter's PQ and 34% of the preset's; between 0.7 and 1.4
#   times, at most 7% and 23%.
#
# The adapter is ahead at every factor. The preset `report` *gains* from a little less haematoxylin: +0.014 at 0.85
# times (+0.008 to +0.020, images drawn), 8% of its PQ. So its PQ does not peak at the unchanged stain. Eosin matters
# little for either: the largest loss is 0.015, for the adapter at twice the eosin.
#
# A claim of robustness should come with such a curve, and name the range in which it holds. Here one laboratory's
# stain was scaled, which is not the same as another laboratory's stain.

# %% tags=["hide-input"]
by = changes.set_index(["model", "stain", "factor"])
plain = by.groupby("model")["plain"].first()
check("0.464", plain["instance"])
check("0.165", plain["report"])
assert 2.7 < plain["instance"] / plain["report"] < 3, "nearly three times"
double = by.xs(("haematoxylin", 2.0), level=("stain", "factor"))
check("0.101", double.loc["instance", "difference"])
check("0.056", double.loc["report", "difference"])
check("22%", -double.loc["instance", "relative"])
check("34%", -double.loc["report", "relative"])
mild = changes[changes["factor"].between(0.7, 1.4)].groupby("model")
check("0.030", mild["difference"].min()["instance"])
check("0.038", mild["difference"].min()["report"])
check("7%", -mild["relative"].min()["instance"])
check("23%", -mild["relative"].min()["report"])
level = by["plain"] + by["difference"]
assert (level["instance"] > level["report"]).all(), (
    "the adapter is ahead at every factor"
)
less = by.loc[("report", "haematoxylin", 0.85)]
check("+0.014", less["difference"])
check("+0.008", less["low"])
check("+0.020", less["high"])
check("8%", less["relative"])
eosin = changes[changes["stain"] == "eosin"]
check("0.015", eosin["difference"].min())
largest = eosin.loc[eosin["difference"].idxmin()]
assert (largest["model"], largest["factor"]) == ("instance", 2.0)
steps = sorted(set(changes["factor"]))
check("0.7", steps[1])
check("0.85", steps[2])
check("1.4", steps[4])
assert (shifted.groupby(["model", "stain", "factor"]).size() == 133).all()

# %% [markdown]
# ## The browser
#
# Choose an image, and set the threshold, the ridge and the smallest area. Look at the truth, the prediction, the
# errors, or truth and prediction side by side, and zoom in; the scores follow. Everything works by keyboard: Tab
# moves from one control to the next, the arrow keys move a slider, and a magnified image scrolls with them, too.
# The images have the source that the captions above name.

# %%
ranks = np.linspace(0, len(ranked) - 1, 6).round().astype(int)
items = [
    (samples[ranked[k]], predict(model, samples[ranked[k]].image)) for k in ranks
]
PredictionBrowser(items)

# %% [markdown]
# All steps of these sliders were computed beforehand, so the page needs no server. In a running notebook the next
# cell decodes at each move, with finer steps:

# %% tags=["skip-execution"]
browse(items)

# %% [markdown]
# ## Summary
#
# - Decoding is four steps: foreground, smoothing, watershed, and merging of basins that meet above the ridge.
# - Show images by rank, not by taste; add a gallery of failures, and say that it is one.
# - Dice does not see merged neighbours. Count them.
# - Measure robustness by changing the input over a stated range, and keep absolute and relative losses apart.
#
# ## Exercises

# %% [markdown]
# ```{exercise} A lower ridge
# :label: ex-predictions-lower-ridge
# You lower the ridge from `0.9` to `0.5`. Will the decoder find more nuclei or fewer? Which kind of error becomes more
# frequent?
# ```

# %% [markdown]
# ```{solution} ex-predictions-lower-ridge
# :class: dropdown
# Fewer. Basins merge if they meet above the ridge times the lower peak, and more pairs meet above a lower limit.
# Mergers become more frequent, and splits rarer.
# ```

# %% [markdown]
# ```{exercise} A fair loss
# :label: ex-predictions-relative
# Under another stain, system A falls from 60 to 50 points of PQ and system B from 20 to 15. Which one is more robust?
# ```

# %% [markdown]
# ```{solution} ex-predictions-relative
# :class: dropdown
# By the absolute loss B, 5 points against 10; by the relative loss A, one sixth against one quarter. Report both, and
# the scores themselves: A is better under either stain.
# ```

# %% [markdown]
# ```{exercise} Nuclei over the ridge
# :label: ex-predictions-ridge
# Decode the patch with ridges of `0.5`, `0.7`, `0.9` and `1.0` and no smallest area. How does the number of nuclei
# change, and what stays the same?
# ```

# %% [markdown]
# ```{solution-start} ex-predictions-ridge
# :class: dropdown
# ```

# %%
cuts = [decode(maps, ridge=ridge, min_area=0) for ridge in (0.5, 0.7, 0.9, 1.0)]
counts = [labels.max() for labels in cuts]
# never fewer: what merges at a high ridge merges at a low one
assert counts == sorted(counts)
# the foreground stays the same
assert all(np.array_equal(labels > 0, foreground) for labels in cuts)

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} A faded slide
# :label: ex-predictions-faded
# A fading slide loses all its stains. Use `restain` to take away half of each of the three amounts. Show that this is
# the same as taking the square root of the transmitted light, `image / 255`. Why?
# ```

# %% [markdown]
# ```{solution-start} ex-predictions-faded
# :class: dropdown
# ```

# %%
faded = restain(patch.image, (0.5, 0.5, 0.5))
# half the density is the root of the light
light = np.sqrt(np.maximum(patch.image / 255, 1e-6))
assert np.abs(faded - 255 * light).max() <= 1
assert faded.mean() > patch.image.mean()

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} What the smallest area is worth
# :label: ex-predictions-area
# Decode the patch with smallest areas of 0, 50 and 200 px. What happens to the number of spurious objects, and what
# to the number of nuclei found?
# ```

# %% [markdown]
# ```{solution-start} ex-predictions-area
# :class: dropdown
# ```

# %%
areas = [errors(patch.labels, decode(maps, min_area=area)) for area in (0, 50, 200)]
spurious = [len(one.spurious) for one in areas]
assert spurious == sorted(spurious, reverse=True)  # never more spurious nuclei
assert len(areas[2].found) <= len(areas[0].found)  # but small true ones go, too

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} Which loss, which winner?
# :label: ex-predictions-winner
# Take the recorded changes with half the haematoxylin. Which system loses less in absolute terms, and which in relative
# terms?
# ```

# %% [markdown]
# ```{solution-start} ex-predictions-winner
# :class: dropdown
# ```

# %%
half = changes[(changes["stain"] == "haematoxylin") & (changes["factor"] == 0.5)]
half = half.set_index("model")
assert half["difference"].idxmax() == "report"  # the smaller absolute loss
assert half["relative"].idxmax() == "instance"  # the smaller relative loss

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ## Further reading
#
# - {cite:t}`ruifrok2001quantification` on separating stains in optical density.
# - {cite:t}`graham2019hovernet` on merged and split nuclei.
