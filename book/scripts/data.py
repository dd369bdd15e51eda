# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # The data: nuclei in stained tissue
#
# The report trains and tests on NuInsSeg {cite}`mahbod2024nuinsseg`: images of tissue stained with haematoxylin and
# eosin ({term}`H&E`), in which experts outlined every nucleus. This chapter shows the images, turns their labels into
# maps that a network can learn, turns maps back into labels, and divides the images into folds.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to read an image with its label map, to encode it as target maps and decode it again, to see how
# tissues differ, and to divide images so that a test score means something.
#
# **You need** a little NumPy. NuInsSeg is a large download, so by default the chapter draws synthetic tissue: images
# made from random numbers and fitted to measurements of the real ones. With them every cell runs anywhere, but they
# are no evidence about real tissue. If the environment variable `NUCSEG_DATA` names a folder with NuInsSeg, the same
# cells run on it.
#
# **Time**: 30 minutes to read, a minute to run.
# ```

# %%
import os
import re
from importlib.resources import files
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.segmentation import clear_border, watershed

from nucseg.data import datasets, splits, synth
from nucseg.instances import RIDGE, components, decode, encode, split
from nucseg.metrics import score
from nucseg.records.provenance import provenance_note
from nucseg.records.quotes import check
from nucseg.records.runs import results_folder
from nucseg.viz import figures
from nucseg.viz.chapters import data as chapter

figures.use_style()
set_matplotlib_formats(
    "jpeg", pil_kwargs={"quality": 88}
)  # photographs: small files

root = os.environ.get("NUCSEG_DATA")
dataset = (
    datasets.NuInsSeg(root) if root else synth.Synthetic(n_per_tissue=2, seed=0)
)
listing = datasets.nuinsseg_list()  # the real data set's images, by name
tissues = sorted(dataset.table["tissue"].unique())

# %%
Markdown(provenance_note(dataset))

# %% [markdown]
# The note above says whether the pictures on this page are real or synthetic. Numbers in the text are those of the
# real NuInsSeg. The package contains a list of its images and a table of their measurements.

# %% [markdown]
# ## An image and its label map
#
# A sample has two parts. The *image* holds red, green and blue, 0 to 255. The {term}`label map` has the same height and
# width and holds one whole number per pixel: 0 is background, and each {term}`nucleus instance` has a number of its
# own. That is what makes this *instance* segmentation: two nuclei that touch stay two.

# %%
sample = dataset[0]
pd.DataFrame(
    {
        "shape": [sample.image.shape, sample.labels.shape],
        "type": [sample.image.dtype, sample.labels.dtype],
        "smallest": [sample.image.min(), sample.labels.min()],
        "largest": [sample.image.max(), sample.labels.max()],
    },
    index=["image", "label map"],
)


# %%
def first_of(tissue):
    """The first sample of a tissue."""
    return dataset[int(np.flatnonzero(dataset.table["tissue"] == tissue)[0])]


wanted = ["human pancreas", "human jejunum", "mouse kidney"]
shown = [chapter.crop(first_of(t), 256) for t in wanted if t in tissues] or [
    chapter.crop(sample, 256)
]

# %% mystnb={"image": {"alt": "Three square images of pink and purple tissue side by side. Every nucleus has a thin coloured outline; nuclei beside each other have different colours."}, "figure": {"caption": "Crops of three samples with the outlines of their label maps. The scale bar assumes 0.25 µm per pixel, usual for a 40× scan; the authors do not state the pixel size. Images: {{ tissue }}.", "name": "fig-data-samples"}}
figures.show_row(*shown)
plt.show()

# %% [markdown]
# Every image of tissue should come with its {term}`pixel size`. It turns pixels into micrometres, and without it
# nobody can say whether a nucleus is large or the image was enlarged. NuInsSeg does not state it. The
# [chapter on your own images](own.ipynb) shows what goes wrong when images have another pixel size than those a model
# was trained on.

# %% [markdown]
# ## From label map to target maps
#
# A network predicts numbers for each pixel, but it cannot predict the ids of a label map, because they are arbitrary:
# any nucleus might be number 7. So the label map is encoded as {term}`target maps`, which the network learns, and its
# predictions are decoded into a label map again.

# %% mystnb={"image": {"alt": "Diagram. A sample is an image and a label map. The network turns the image into predicted maps, encode turns the label map into target maps; the loss compares the two. Decode turns the predicted maps into a predicted label map, which is scored against the label map."}, "figure": {"caption": "From a sample to a loss and to a score. Training compares maps; scoring compares label maps.", "name": "fig-data-flow"}}
chapter.plot_flow()
plt.show()

# %% [markdown]
# The first target map is the {term}`foreground`: 1 inside any nucleus. It cannot tell touching nuclei apart. The
# second is the {term}`distance map`: how deep inside its nucleus a pixel lies, counted up to 6 px and divided by the
# greatest depth in that nucleus, so that every nucleus reaches 1. Between two nuclei that touch, it has a valley. In
# code, nucleus by nucleus:


# %%
def encode_by_hand(labels, deep=6.0):
    """(H, W) label map -> (2, H, W) target maps."""
    distance = np.zeros(labels.shape)
    for i in range(1, labels.max() + 1):
        nucleus = labels == i
        interior = ndimage.binary_erosion(nucleus, border_value=1)
        depth = ndimage.distance_transform_edt(interior) + 0.5  # the rim has 0.5
        depth = np.minimum(depth, deep)
        distance[nucleus] = depth[nucleus] / depth[nucleus].max()
    return np.stack([labels > 0, distance])


busy = chapter.crop(
    first_of("mouse thymus" if "mouse thymus" in tissues else tissues[0]), 160
)
maps = encode(busy.labels)
assert np.allclose(encode_by_hand(busy.labels), maps, atol=1e-6)

# %% [markdown]
# The package's `encode` gives the same maps. `border_value=1` says that the image's edge is not an outline, because a
# nucleus that is cut off there continues beyond it.

# %% mystnb={"image": {"alt": "Four square panels of one crop: the image, its label map with each nucleus in a colour, the white foreground in which touching nuclei run together, and the distance map, bright inside nuclei with dark lines between them."}, "figure": {"caption": "A crop, its label map, and the two target maps. In the distance map, touching nuclei are separated by a dark valley. The scale bar assumes 0.25 µm per pixel. Image: {{ tissue }}.", "name": "fig-data-encoding"}}
chapter.plot_encoding(busy, maps)
plt.show()

# %% [markdown]
# ## And back again
#
# Decoding turns maps into a label map. The simplest way, which the report uses, takes each
# {term}`connected component` of the foreground as one nucleus. Touching nuclei then become one object. The
# {term}`watershed` separates them: it floods the distance map from its peaks, and where two floods meet, it draws a
# line.

# %%
foreground, distance = maps
smooth = ndimage.gaussian_filter(distance, 2)
peaks = smooth == ndimage.maximum_filter(smooth, size=3)
markers, _ = ndimage.label(peaks & (foreground > 0.5))
basins = watershed(-smooth, markers, mask=foreground > 0.5)

# %% [markdown]
# True maps are smooth, and here most nuclei have one peak. Predicted maps are noisy: many nuclei have several peaks,
# and each peak gives a basin of its own. So two basins are merged again if the {term}`ridge` between them is higher
# than
# 0.9 times the lower of their peaks, because then there is no real valley. `decode` does all of this:

# %%
steps = {
    "truth": busy.labels,
    "components": components(foreground),
    "watershed": basins,
    "decode": decode(maps, min_area=0),
}

# %% mystnb={"image": {"alt": "Four label maps of the same crop, each nucleus in a colour. Components run together into few large objects; the watershed separates them, at times into more pieces than there are nuclei; decode looks like the truth."}, "figure": {"caption": "The same maps, decoded in three ways, beside the truth. Image: {{ tissue }}.", "name": "fig-data-decoding"}}
chapter.plot_decoding(steps)
plt.show()

# %% [markdown]
# The factor 0.9 is an option, `ridge`. The table below counts the objects for four of its values. With 0, everything
# that touches along an edge is one object. (*Components* above also joins nuclei that touch at a corner only, and can
# therefore give fewer.) True maps have deep valleys, so any larger value gives much the same. Predicted valleys are
# shallow; there, 0.9 did best on validation images.

# %%
pd.Series(
    {
        ridge: len(np.unique(split(smooth, foreground > 0.5, ridge))) - 1
        for ridge in (0.0, 0.3, 0.6, 0.9)
    },
    name="objects",
).rename_axis("ridge").to_frame()

# %% [markdown]
# How much is lost by encoding and decoding? On all 665 real images, encoding and decoding the true label maps gives a
# {term}`PQ <panoptic quality>` of 0.984 and an {term}`AJI <aggregated jaccard index>` of 0.988; both scores, which
# [Cross-validation](crossvalidation.ipynb) explains, are 1 for a perfect result. At half the resolution, that of the
# maps our network predicts, PQ is 0.971. By contrast, the connected components of a perfect foreground reach a PQ of
# 0.704, measured on 31 of the images, one per tissue. A network that predicts only a foreground, decoded this way, can
# hardly do better.

# %% tags=["hide-input"]
recorded = results_folder() / "representations"
strides = pd.read_csv(recorded / "strides.csv", index_col="stride")
check("0.9", RIDGE)
check("0.984", strides.loc[1, "pq"])
check("0.988", strides.loc[1, "aji"])
check("0.971", strides.loc[2, "pq"])
assert (strides["images"] == 665).all(), "on all 665 images"
ways = pd.read_csv(recorded / "representations.csv")
alone = ways[ways["representation"] == "foreground, components"].query(
    "noise == 'none'"
)
check("0.704", alone.set_index("stride").loc[1, "pq"])
assert score(busy.labels, steps["decode"]).pq > 0.9, "decode looks like the truth"
assert steps["components"].max() < busy.labels.max(), "components are fewer"
assert basins.max() >= steps["decode"].max(), "the watershed alone gives more"

# %% [markdown]
# ## The tissues
#
# Each crop below is cut from the first image of its {term}`tissue`, at the place with the most nuclei. Nuclei of the
# mouse spleen lie close together and look alike. In the human brain they are far apart and of several sizes. A model
# that does well on one may fail on the other, and an average over all images hides that.

# %%
choice = [
    "human " + organ for organ in ("brain", "jejunum", "liver", "lung", "muscle")
]
choice += [
    "human pancreas",
    "human placenta",
    "human spleen",
    "human umbilical cord",
]
choice += ["mouse kidney", "mouse spleen", "mouse thymus"]
of_tissues = [first_of(tissue) for tissue in choice if tissue in tissues]

# %% mystnb={"image": {"alt": "Grid of small square crops, one for each of twelve tissues, with outlined nuclei. They differ in colour, in the density of nuclei and in their shape."}, "figure": {"caption": "Twelve of the 31 tissues. The scale bar in the first crop holds for all, at an assumed 0.25 µm per pixel. Images: {{ tissue }}.", "name": "fig-data-tissues"}}
chapter.plot_tissues(of_tissues)
plt.show()

# %% [markdown]
# ## How many, how large, how close
#
# `synth.statistics` measures a set of samples. The same measurements of the real NuInsSeg come with the package, one
# row per tissue, so that the images on this page can be compared with them.

# %%
positions = dataset.table.groupby("tissue").indices
here = pd.DataFrame(
    {t: synth.statistics(dataset[int(i)] for i in positions[t]) for t in tissues}
).T
nuclei = [int(dataset[i].labels.max()) for i in range(len(dataset))]
counted = dataset.table.assign(nuclei=nuclei)
table = files("nucseg") / "assets" / "nuinsseg_tissue_stats.csv"
measured = pd.read_csv(table, index_col="tissue")
real = measured.loc[tissues]

# %% [markdown]
# NuInsSeg has 665 images with 30,698 nuclei, between 1 and 297 per image. The mean number per image ranges from 6
# (mouse tibial muscle) to 237 (mouse spleen).

# %% mystnb={"image": {"alt": "Two cumulative curves of the number of nuclei in an image, one for the images behind this page and one for NuInsSeg. Both rise steeply up to about fifty nuclei and then flatten."}, "figure": {"caption": "Share of the images with at most the number of nuclei on the horizontal axis. Each tissue has the same weight.", "name": "fig-data-counts"}}
chapter.plot_counts(listing, counted, "behind this page")
plt.show()

# %% [markdown]
# Three measurements matter most for what follows. The number of nuclei says how much one image teaches. Their *area*
# decides how much of a nucleus survives when an image is scaled down. The *touching fraction* is the share of nuclei
# that touch another one. A method that takes each connected component as one nucleus merges exactly these, even if
# its foreground is perfect.

# %% mystnb={"image": {"alt": "Three scatter plots with one dot per tissue: nuclei per image, median area, and touching fraction. NuInsSeg is on the horizontal axis, the images behind this page on the vertical one. The dots lie along the diagonal."}, "figure": {"caption": "One dot per tissue: the images behind this page against NuInsSeg. On the diagonal the two agree.", "name": "fig-data-agreement"}}
chapter.plot_agreement(real, here)
plt.show()

# %%
chapter.agreement_table(real, here)

# %% [markdown]
# In the real mouse thymus, 81% of the nuclei touch another one; in mouse fat, 5%. Remember this when you read the
# scores of these tissues.

# %% tags=["hide-input"]
check("30,698", listing["nuclei"].sum())
assert (len(listing), listing["nuclei"].min(), listing["nuclei"].max()) == (
    665,
    1,
    297,
)
by_tissue = listing.groupby("tissue")["nuclei"].mean().sort_values()
assert by_tissue.index[0] == "mouse muscle_tibia" and round(by_tissue.iloc[0]) == 6
assert by_tissue.index[-1] == "mouse spleen" and round(by_tissue.iloc[-1]) == 237
close = measured["touching_fraction"].sort_values()
assert close.index[-1] == "mouse thymus" and close.index[0].startswith("mouse fat")
check("81%", close.iloc[-1])
check("5%", close.iloc[0])

# %% [markdown]
# ## Stains absorb light
#
# {term}`Haematoxylin <haematoxylin>` colours nuclei blue, {term}`eosin` colours most of the rest pink. Both absorb
# light, and absorption multiplies: if one layer of dye lets a tenth of the light through, two layers let a hundredth
# through. On a logarithmic scale, absorption adds up instead. This scale is the {term}`optical density`,
#
# $$
# D = -\log_{10} \frac{I}{I_0}
# $$
#
# where $I_0$ is the light that passes through empty glass. In optical density, the colour of a pixel is a weighted
# sum of the two dyes' colours. Its three channels give three equations, which can be solved for the two amounts of
# dye {cite}`ruifrok2001quantification`. `rgb2hed` of scikit-image does so. The synthetic images are made the opposite
# way: from amounts of dye to colours.

# %%
stained = chapter.crop(
    first_of("human kidney" if "human kidney" in tissues else tissues[0]), 256
)
dyes = rgb2hed(stained.image)

# %% mystnb={"image": {"alt": "A crop of tissue and, beside it, its haematoxylin and its eosin as grey images. Nuclei stand out dark in the haematoxylin image and are less distinct in the eosin image."}, "figure": {"caption": "A crop and the amounts of the two dyes in it; darker means more. The scale bar assumes 0.25 µm per pixel. Image: {{ tissue }}.", "name": "fig-data-stains"}}
chapter.plot_stains(stained, dyes)
plt.show()

# %% [markdown]
# One detail of NuInsSeg is easy to miss: its images are dark. Where the glass is empty, the red channel is not near
# 255 but 145, the median over tissues. Code that takes 255 for $I_0$ finds dye on empty glass.

# %% tags=["hide-input"]
assert round(measured["white_r"].median()) == 145, "empty glass has 145 in red"

# %% [markdown]
# ## Folds, and why the file list is pinned
#
# With few images, the score depends on which of them happen to be test images.
# {term}`Cross-validation <cross-validation>` divides them into five {term}`folds <fold>`, tests on each in turn, and
# trains on the others. The NuInsSeg benchmark, as we call the evaluation of the data set's authors, uses
# scikit-learn's `KFold` and shuffles with a fixed {term}`seed`, 19:


# %%
def fold_of(names):
    """The fold of each name: what KFold(5, shuffle=True, random_state=19) does."""
    order = np.arange(len(names))
    np.random.RandomState(19).shuffle(order)
    parts = np.array_split(order, 5)
    return {names[i]: k for k, part in enumerate(parts, start=1) for i in part}


stems = listing["stem"].tolist()  # in the order of the full paths
benchmark = fold_of(stems)
package = splits.folds(SimpleNamespace(table=listing))
assert all(
    benchmark[stems[i]] == k for k, s in enumerate(package, 1) for i in s.test
)

# %% [markdown]
# A fixed seed alone does not make the folds reproducible: the shuffle is applied to a *list*, whose order matters as
# much as the seed. The benchmark's list is sorted by the full path, folder first. Suppose someone sorts by file name
# instead, or keeps the path but sorts 2 before 10, as a file browser does:


# %%
def natural(path):
    """A key that sorts 2 before 10."""
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)]


path_of = dict(zip(stems, listing["tissue"] + "/" + listing["stem"], strict=True))
orders = {
    "by file name": sorted(stems),
    "numbers as numbers": sorted(stems, key=lambda stem: natural(path_of[stem])),
}
moved = {
    words: sum(benchmark[s] != fold for s, fold in fold_of(order).items())
    for words, order in orders.items()
}
pd.Series(moved, name="images in another fold").to_frame()

# %% [markdown]
# With the same seed, 155 or 91 of the 665 images land in another fold. So `nucseg` contains the list itself, and
# every run stores a hash of the names in its training, validation and test parts. Even in a partial copy of the data,
# each image keeps its fold.
#
# The public code of the benchmark also chooses its {term}`checkpoint`, the epoch whose weights are kept, on the test
# fold. That makes the score optimistic. Here a {term}`validation part` is held out of the training folds for this
# choice:

# %%
pd.DataFrame(
    {
        s.name: {
            "train": len(s.train),
            "validation": len(s.val),
            "test": len(s.test),
        }
        for s in package
    }
).T

# %% tags=["hide-input"]
assert list(moved.values()) == [155, 91], "155 or 91 images land in another fold"

# %% [markdown]
# ## How folds leak
#
# A {term}`test part` is only as good as its separation from the training images. We compare three protocols:

# %%
whole = SimpleNamespace(table=listing)
left_out = {s.name: s for s in splits.leave_one_tissue_out(whole)}
protocols = {
    "benchmark": package[0],
    "report’s code": splits.report_folds(whole)[0],
    "one tissue out": left_out["human cerebellum"],
}
rows = [
    "bladder",
    "brain",
    "cardia",
    "cerebellum",
    "epiglottis",
    "jejunum",
    "lung",
    "muscle",
]

# %% mystnb={"image": {"alt": "Three panels of squares, one row per tissue and one square per image. In the benchmark, most rows have both training and test images. In the report's code, every test square is also a training square. Leaving out one tissue makes one whole row test images and leaves none in the other rows."}, "figure": {"caption": "Which images train, validate and test, in eight of the 31 tissues; the first two panels show fold 1. Hatched: test images that were trained or validated on too.", "name": "fig-data-leaks"}}
chapter.plot_leaks(listing, protocols, ["human " + organ for organ in rows])
plt.show()

# %% [markdown]
# In the benchmark no image is on both sides, but slides very probably are: the images of a tissue were very probably
# cut from one slide, and every test image of fold 1 has siblings of its tissue in the training part. So these scores
# say how well a model does on more of the slides that it has seen. The folds do not balance tissues either: of the 44
# images of the human salivary gland, one fold tests 4 and another 16.
#
# In the report's code, the test images are a random fifth of the whole list, the same for all folds, while the folds
# divide the first seven tenths of the sorted list. The two overlap: of the 133 test images, 72 are in the training part
# of fold 1 and 18 in its validation part. [Cross-validation](crossvalidation.ipynb) measures how much that changes the
# scores.
#
# `splits.leave_one_tissue_out` asks the hardest of the three questions: how well a model does on a tissue that it has
# never seen.

# %% tags=["hide-input"]
trained = set(listing["tissue"].iloc[list(package[0].train)])
tested = listing["tissue"].iloc[list(package[0].test)]
assert set(tested) <= trained, "all test images have siblings in training"
gland = listing[listing["tissue"] == "human salivory gland"]["stem"].map(benchmark)
counts = gland.value_counts()
assert (counts.sum(), counts.min(), counts.max()) == (44, 4, 16), (
    "44 images, 4 to 16"
)
leaky = protocols["report’s code"]
both = [len(set(leaky.test) & set(part)) for part in (leaky.train, leaky.val)]
assert [len(leaky.test), *both] == [133, 72, 18], "72 and 18 of 133 test images"
assert list(chapter.parts_of(listing, leaky)).count("training and test") == 90

# %% [markdown]
# ## Vague areas
#
# Even experts cannot outline every nucleus: some are out of focus, cut by the blade, or covered. NuInsSeg's authors
# marked these {term}`vague areas <vague area>`, and `Sample.vague` holds them if your copy of the data set includes
# them. An example made by hand shows what they are for. Suppose that the annotators were unsure about the largest
# whole nucleus of a crop, left it out and marked its place as vague. A model outlines every nucleus, this one
# included:

# %%
prediction = chapter.crop(
    first_of(choice[1] if choice[1] in tissues else tissues[0]), 160
).labels
areas = np.bincount(clear_border(prediction).ravel())
doubtful = prediction == np.argmax(areas[1:]) + 1
vague = ndimage.binary_dilation(doubtful, iterations=4)
truth = np.where(doubtful, 0, prediction)

plain, lenient = score(truth, prediction), score(truth, prediction, vague=vague)
pd.DataFrame(
    {"PQ": [plain.pq, lenient.pq]}, index=["all counts", "vague area ignored"]
).round(3)

# %% mystnb={"image": {"alt": "The same crop twice. Left: true outlines in orange and a hatched area around a nucleus without outline. Right: predicted outlines in blue, one of them around that nucleus."}, "figure": {"caption": "A nucleus that is missing from the truth, inside a vague area made for this example, and a prediction that contains it. The scale bar assumes 0.25 µm per pixel. Image: {{ tissue }}.", "name": "fig-data-vague"}}
source = chapter.crop(
    first_of(choice[1] if choice[1] in tissues else tissues[0]), 160
)
chapter.plot_vague(
    datasets.Sample(source.image, truth, source.tissue, source.stem),
    vague,
    prediction,
)
plt.show()

# %% [markdown]
# Counted as usual, the extra nucleus is a {term}`false positive`. With the vague area ignored, the prediction is
# perfect. The benchmark counts everything, and so do the scores of this book, unless they say otherwise. Ignoring
# vague areas raises scores without making the model better, so the two kinds of scores must not be compared.

# %% tags=["hide-input"]
assert lenient.pq == 1 and plain.pq < 1, "ignored, the prediction is perfect"

# %% [markdown]
# ## What to look out for in the files
#
# The files have a few peculiarities that a loader must know. `datasets.NuInsSeg` handles them.
#
# - **Several kinds of masks.** `label masks modify` holds the label maps to score against. The folder `label masks`
#   gives each overlap of two nuclei a number of its own, so it counts more objects than there are nuclei. The
#   report's code reads `label masks`.
# - **Names.** Two folders are misspelt (`human salivory gland`, `human tonsile`), and in 2 of 31 tissues the file
#   names do not begin with the folder's name. Numbers are zero-padded in 20 tissues and have gaps in 5. Image and
#   mask must be paired by name, never by their position in two sorted lists. In one public copy of the data set, some
#   masks belong to another image.
# - **Formats.** One image, `human_liver_31`, has a fourth channel. `Thumbs.db` and `.DS_Store` lie among the images.
# - **Nuclei in pieces.** Some nuclei consist of more than one connected piece, so relabelling the components of a mask
#   changes the truth.

# %% tags=["hide-input"]
groups = listing.groupby("tissue")["stem"]
begins = [g.str.startswith(t.replace(" ", "_")).all() for t, g in groups]
padded = [g.str.contains(r"_0\d+$").any() for _, g in groups]
numbers = [g.str.extract(r"(\d+)$")[0].astype(int) for _, g in groups]
gaps = [n.max() - n.min() + 1 > len(n) for n in numbers]
assert len(begins) - sum(begins) == 2 and len(begins) == 31, "2 of 31 tissues"
assert (sum(padded), sum(gaps)) == (20, 5), "padded in 20, gaps in 5"

# %% [markdown]
# ## Get the real images
#
# One command downloads NuInsSeg from [Zenodo](https://doi.org/10.5281/zenodo.10518968) (1.6
# GB, CC BY 4.0: name its authors), checks its hash and unpacks it. Run it again to resume an interrupted download:
#
# ```sh
# nucseg fetch nuinsseg --out data/nuinsseg
# export NUCSEG_DATA=data/nuinsseg
# ```
#
# In the Windows command prompt the second line is `set NUCSEG_DATA=data\nuinsseg`. For your own images, two folders are
# enough, `nucseg.ImageFolder("images", "masks")`: `images/x.png` belongs to `masks/x.tif`.

# %% [markdown]
# ## Summary
#
# - A sample is an image and a label map; each nucleus has its own number.
# - A network learns target maps. Encoding and decoding lose little; a foreground alone loses the touching nuclei.
# - Tissues differ greatly in the number, size and crowding of nuclei. Look at scores by tissue.
# - A split is a list of names. A seed without the list does not reproduce it, and images of one slide on both sides
#   can make a test easier than it looks.
# - The synthetic images share the measured statistics of NuInsSeg. Use them to run the code, not to draw conclusions
#   about tissue.

# %% [markdown]
# ## Exercises
#
# ```{exercise} Ids without meaning
# :label: ex-data-ids
# Two people label the same image. Their outlines are identical, but they number the nuclei in different orders. Which
# of these differ: the label maps, the target maps, the scores of a prediction?
# ```
#
# ```{solution} ex-data-ids
# :class: dropdown
# Only the label maps. Target maps depend on where nuclei are, not on their numbers, and scores match nuclei by overlap.
# ```

# %% [markdown]
# ```{exercise} Twice the dye
# :label: ex-data-dye
# A nucleus lets a quarter of the light through. What is its optical density? What fraction of the light passes through
# two such nuclei, one above the other?
# ```
#
# ```{solution} ex-data-dye
# :class: dropdown
# The optical density is $\log_{10} 4$, about 0.60. Densities add up, so two have 1.20, and a sixteenth of the light
# passes.
# ```

# %% tags=["hide-input"]
check("0.60", np.log10(4))
check("1.20", np.log10(16))

# %% [markdown]
# ```{exercise} Count what touches
# :label: ex-data-touching
# Write `touching_share(labels)`: the share of nuclei of which at least one pixel has a pixel of another nucleus among
# its eight neighbours. Use `ndimage.maximum_filter` and `ndimage.minimum_filter`, and compare with
# `synth.touching(labels)`, which returns the ids of the touching nuclei.
# ```

# %% [markdown]
# ```{solution-start} ex-data-touching
# :class: dropdown
# ```


# %%
def touching_share(labels):
    highest = ndimage.maximum_filter(labels, 3)
    empty = np.where(labels > 0, labels, labels.max() + 1)  # background never wins
    lowest = ndimage.minimum_filter(empty, 3)
    meets = (labels > 0) & ((highest != labels) | (lowest != labels))
    return len(np.unique(labels[meets])) / len(np.unique(labels[labels > 0]))


expected = len(synth.touching(busy.labels)) / busy.labels.max()
assert np.isclose(touching_share(busy.labels), expected)

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} Folds that balance tissues
# :label: ex-data-stratify
# Write `balanced(tissues, n, seed)`, which gives each image a fold so that each tissue is spread over the folds as
# evenly as its number of images allows. Check it on the human salivary gland. Would such folds stop the leak of slides?
# ```

# %% [markdown]
# ```{solution-start} ex-data-stratify
# :class: dropdown
# ```


# %%
def balanced(tissues, n=5, seed=0):
    rng = np.random.default_rng(seed)
    fold = np.zeros(len(tissues), int)
    for tissue in np.unique(tissues):
        images = rng.permutation(np.flatnonzero(tissues == tissue))
        fold[images] = (np.arange(len(images)) + rng.integers(n)) % n + 1
    return fold


fold = balanced(listing["tissue"].to_numpy())
of_gland = np.bincount(fold[listing["tissue"] == "human salivory gland"])[1:]
assert of_gland.sum() == 44 and np.ptp(of_gland) <= 1

# %% [markdown]
# It would not. Each fold now tests every tissue about equally, so each slide is still on both sides. To stop the
# leak, all images of a tissue must be in one fold.
#
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} How small may the maps be?
# :label: ex-data-stride
# Shrink the label map of `busy` by `k` = 2, 4 and 8 with `labels[::k, ::k]`, encode it with `encode(small, 6 / k)`,
# decode it with `decode(maps, min_area=0, smooth=2 / k)`, enlarge the result with `np.kron` and score it. How does PQ
# change with `k`, and why?
# ```

# %% [markdown]
# ```{solution-start} ex-data-stride
# :class: dropdown
# ```

# %%
round_trips = {}
for k in (1, 2, 4, 8):
    small = encode(busy.labels[::k, ::k], 6 / k)
    found = decode(small, min_area=0, smooth=2 / k)
    large = np.kron(found, np.ones((k, k), np.int32))
    round_trips[k] = score(busy.labels, large).pq
print({k: round(pq, 3) for k, pq in round_trips.items()})
assert round_trips[1] > round_trips[4] > round_trips[8]

# %% [markdown]
# PQ falls as the maps get smaller: first because outlines become coarse, then also because small nuclei vanish and
# neighbours merge. The report's head predicts at stride 16.
#
# ```{solution-end}
# ```

# %% [markdown]
# ## Further reading
#
# - {cite:t}`mahbod2024nuinsseg` describe how NuInsSeg was made and scored.
# - {cite:t}`kumar2017aji` is an earlier data set with touching nuclei, and the origin of the AJI score.
# - {cite:t}`ruifrok2001quantification` separate stains by optical density.
