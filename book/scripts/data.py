# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # The data: nuclei in stained tissue

# %% tags=["hide-input"]
import os
import re
import textwrap
import time
from importlib.resources import files
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from skimage.color import rgb2hed

from nucseg.data import datasets, fetch, splits, synth
from nucseg.records.provenance import provenance_note
from nucseg.viz import figures

started = time.monotonic()
figures.use_style()

root = os.environ.get("NUCSEG_DATA")
dataset = (
    datasets.NuInsSeg(root) if root else synth.Synthetic(n_per_tissue=2, seed=0)
)
listing = datasets.nuinsseg_list()  # the real data set's images, by name
Markdown(provenance_note(dataset))

# %% [markdown]
# ## Overview
#
# The report trains and tests on NuInsSeg {cite}`mahbod2024nuinsseg`: images of tissue stained with
# haematoxylin and eosin (H&E), in which experts outlined every nucleus. This page shows
#
# 1. what one image with its *label map* looks like, and how tissues differ;
# 2. how many nuclei there are, how large they are and how often they touch, because these decide how hard
#    the task is;
# 3. how the images are divided into folds, and why a list of file names has to be part of the protocol;
# 4. what to look out for in the files, and how to get them.
#
# ## What you need
#
# Nothing but this book. NuInsSeg is a large download, so the book draws its own tissue by default: synthetic
# images, made from random numbers, that were fitted to measurements of the real ones. They let every cell
# run anywhere; they are no evidence about real tissue. If the environment variable `NUCSEG_DATA` names a
# folder with NuInsSeg, the same cells run on it. The line above says which of the two you are looking at.

# %% [markdown]
# ## An image and its label map
#
# A sample has two parts. The *image* holds red, green and blue, 0 to 255. The *label map* has the same height
# and width and holds one whole number a pixel: 0 is background, and each nucleus has a number of its own.
# That is what makes this *instance* segmentation: two nuclei that touch stay two.

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


# %% mystnb={"image": {"alt": "Three square images of pink and purple tissue side by side. Every nucleus has a thin coloured outline; nuclei beside each other have different colours."}, "figure": {"caption": "Three samples with the outlines of their label maps. The scale bar assumes 0.25 µm a pixel, usual for a 40x scan; the authors do not state the pixel size.", "name": "fig-data-samples"}} tags=["hide-input"]
def first_of(tissue):
    """The first sample of a tissue."""
    return dataset[int(np.flatnonzero(dataset.table["tissue"] == tissue)[0])]


tissues = sorted(dataset.table["tissue"].unique())
wanted = [
    t for t in ("human pancreas", "human jejunum", "mouse kidney") if t in tissues
]
figures.show_row(*(first_of(tissue) for tissue in wanted or tissues[:3]))
plt.show()

# %% [markdown]
# ## The tissues
#
# Each crop below is cut from the first image of its tissue, at the place with the most nuclei. Nuclei of the
# spleen lie close together and are alike. In the brain they are far apart and of several sizes. A model that
# does well on one may fail on the other, so averages over all images hide a lot.


# %% mystnb={"image": {"alt": "Grid of small square crops, one for each human tissue, with outlined nuclei. They differ in colour, in the density of nuclei and in their shape."}, "figure": {"caption": "Human tissues. The scale bar in the first crop holds for all, at an assumed 0.25 µm a pixel.", "name": "fig-data-human"}} tags=["hide-input"]
def busiest(sample, size=176):
    """The square window, out of a few, in which most of the area is nuclei."""
    tops, lefts = (
        np.linspace(0, side - size, 5).astype(int) for side in sample.labels.shape
    )
    windows = [np.s_[t : t + size, l : l + size] for t in tops for l in lefts]  # noqa: E741
    window = max(windows, key=lambda w: np.count_nonzero(sample.labels[w]))
    return sample.image[window], sample.labels[window]


def show_tissues(species, columns=4):
    names = [tissue for tissue in tissues if tissue.startswith(species)]
    rows = -(-len(names) // columns)
    _, axes = plt.subplots(
        rows, columns, figsize=(figures.WIDTH, 1.75 * rows), squeeze=False
    )
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names, strict=False):
        figures.overlay(*busiest(first_of(name)), ax, width=0.7)
        short = name.removeprefix(species).strip().replace("_", " ")
        ax.set_title("\n".join(textwrap.wrap(short, 18)), fontsize=9)
    if names:
        figures.scale_bar(axes[0, 0], um=10)
    plt.show()


show_tissues("human")

# %% mystnb={"image": {"alt": "Grid of small square crops, one for each mouse tissue, with outlined nuclei."}, "figure": {"caption": "Mouse tissues, at the same scale.", "name": "fig-data-mouse"}} tags=["hide-input"]
show_tissues("mouse")

# %% [markdown]
# ## How many, how large, how close
#
# `synth.statistics` measures any samples. The same measurements of the real NuInsSeg come with the package,
# one row a tissue, so what is shown on this page can be held against them.

# %%
samples = [dataset[i] for i in range(len(dataset))]
here = pd.DataFrame(
    {
        tissue: synth.statistics(s for s in samples if s.tissue == tissue)
        for tissue in tissues
    }
).T
real = pd.read_csv(
    files("nucseg") / "assets" / "nuinsseg_tissue_stats.csv",
    index_col="tissue",
)
real = real.loc[tissues]

# %% tags=["remove-input"]
counts = [int(s.labels.max()) for s in samples]
per_tissue = listing.groupby("tissue")["nuclei"].mean()
Markdown(
    f"NuInsSeg has {len(listing)} images with {listing['nuclei'].sum():,} nuclei, between {listing['nuclei'].min()} "
    f"and {listing['nuclei'].max()} in an image. The {len(samples)} images behind this page have {sum(counts):,}, "
    f"between {min(counts)} and {max(counts)}. From tissue to tissue the real mean count goes from "
    f"{per_tissue.min():.0f} ({per_tissue.idxmin()}) to {per_tissue.max():.0f} ({per_tissue.idxmax()})."
)


# %% mystnb={"image": {"alt": "Two cumulative curves of the number of nuclei in an image, one for the images behind this page and one for NuInsSeg. Both rise steeply up to about fifty nuclei and then flatten."}, "figure": {"caption": "Share of the images that have at most so many nuclei; all tissues count the same.", "name": "fig-data-counts"}} tags=["hide-input"]
def counted(nuclei, tissues, source):
    """One row per image; each tissue has the same total weight."""
    weight = 1 / tissues.map(tissues.value_counts())
    return pd.DataFrame(
        {"nuclei": list(nuclei), "weight": list(weight), "source": source}
    )


per_image = pd.concat(
    [
        counted(listing["nuclei"], listing["tissue"], "NuInsSeg"),
        counted(counts, dataset.table["tissue"], "behind this page"),
    ],
    ignore_index=True,
)
figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.8))
sns.ecdfplot(per_image, x="nuclei", weights="weight", hue="source", ax=ax)
ax.lines[-1].set_linestyle(
    "--"
)  # told apart without colour too: NuInsSeg, drawn last
ax.get_legend().get_lines()[0].set_linestyle("--")
sns.move_legend(ax, "lower right", title=None)
ax.set(xlabel="nuclei in an image", ylabel="share of images", xlim=(0, None))
plt.show()

# %% [markdown]
# Three measurements matter most for what follows. *Area* decides how much of a nucleus survives when an image
# is scaled down. The *touching fraction* is the share of nuclei that touch another one: a method that takes
# each connected piece of foreground for one nucleus must merge exactly these.

# %% mystnb={"image": {"alt": "Three scatter plots with one dot a tissue: nuclei an image, median area, and touching fraction. NuInsSeg is on the horizontal axis, the images behind this page on the vertical one. The dots lie along the diagonal."}, "figure": {"caption": "One dot a tissue: the images behind this page against NuInsSeg. On the line the two agree.", "name": "fig-data-agreement"}} tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 2.5))
measures = {
    "nuclei_per_image_mean": "nuclei an image",
    "area_px_median": "median area, px",
    "touching_fraction": "touching fraction",
}
for ax, (column, words) in zip(axes, measures.items(), strict=True):
    top = 1.08 * max(real[column].max(), here[column].max())
    ax.plot([0, top], [0, top], color="0.75", linewidth=1, zorder=0)
    ax.scatter(real[column], here[column], s=12, color=figures.SERIES[0])
    ax.set(
        title=words, xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="NuInsSeg"
    )
    ax.locator_params(nbins=3)
axes[0].set_ylabel("this page")
plt.show()

# %% tags=["hide-input"]
columns = {**measures, "eccentricity_median": "eccentricity"}
table = pd.concat(
    {
        words: pd.DataFrame({"real": real[c], "here": here[c]})
        for c, words in columns.items()
    },
    axis=1,
)
digits = {
    (words, side): "{:.2f}" if "fraction" in c or "ecc" in c else "{:.0f}"
    for c, words in columns.items()
    for side in ("real", "here")
}
table.style.format(digits)

# %% tags=["remove-input"]
close = real["touching_fraction"].sort_values()
Markdown(
    f"In the real {close.index[-1]}, {close.iloc[-1]:.0%} of the nuclei touch another one; in the {close.index[0]}, "
    f"{close.iloc[0]:.0%}. Remember this when you read a score of {close.index[-1].split(' ', 1)[1]}."
)

# %% [markdown]
# ## Stains absorb light
#
# Haematoxylin colours nuclei blue, eosin colours most of the rest pink. Both absorb light, and absorption
# multiplies: twice the dye lets the square of the fraction through. On a logarithmic scale it adds up. This
# scale is the optical density,
#
# $$
# D = -\log_{10} \frac{I}{I_0}
# $$
#
# where $I_0$ is the light that passes through empty glass. In optical density a colour is a sum of so much
# haematoxylin and so much eosin, which can be solved for both {cite}`ruifrok2001quantification`. The synthetic
# images are made the opposite way: from amounts of dye to colours.

# %% mystnb={"image": {"alt": "A crop of tissue and, beside it, its haematoxylin and its eosin as grey images. Nuclei are dark in the haematoxylin image and faint in the eosin image."}, "figure": {"caption": "A crop and the amounts of the two dyes in it; darker means more.", "name": "fig-data-stains"}} tags=["hide-input"]
tissue = "human kidney" if "human kidney" in tissues else tissues[0]
crop, crop_labels = busiest(first_of(tissue), 256)
dyes = rgb2hed(crop)
figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 2.3))
for ax, picture, title in zip(
    axes,
    (crop, dyes[..., 0], dyes[..., 1]),
    (tissue, "haematoxylin", "eosin"),
    strict=True,
):
    limits = (
        {}
        if picture.ndim == 3
        else dict(
            zip(("vmin", "vmax"), np.quantile(picture, (0.01, 0.99)), strict=True)
        )
    )
    ax.imshow(picture, cmap="gray_r", **limits)
    ax.set_title(title)
    ax.axis("off")
plt.show()

# %% tags=["remove-input"]
Markdown(
    f"One detail of NuInsSeg is easy to miss: its images are dark. Where the glass is empty the red channel is "
    f"{real['white_r'].median():.0f} at the median over tissues, not near 255. Code that takes 255 for $I_0$ finds dye "
    "on empty glass."
)

# %% [markdown]
# ## Folds, and why the file list is pinned
#
# With few images, one division into training and test images is a matter of luck. *Cross-validation* divides
# them into five folds, tests on each in turn, and trains on the others. The NuInsSeg benchmark uses
# scikit-learn's `KFold` with a shuffle of a fixed seed, 19. That sounds reproducible, and is only half of it:
# the shuffle is applied to a *list*, and its order counts as much as the seed.


# %%
def fold_of(names):
    """The fold of each name: what KFold(5, shuffle=True, random_state=19) does."""
    order = np.arange(len(names))
    np.random.RandomState(19).shuffle(order)
    return {
        names[i]: k for k, part in enumerate(np.array_split(order, 5)) for i in part
    }


def natural(path):
    """Sort 2 before 10."""
    return [
        int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)
    ]


stems = listing["stem"].tolist()  # in the order of the full paths
benchmark = fold_of(stems)
by_stem = fold_of(sorted(stems))
path_of = dict(zip(stems, listing["tissue"] + "/" + listing["stem"], strict=True))
by_number = fold_of(sorted(stems, key=lambda stem: natural(path_of[stem])))

package_folds = splits.folds(SimpleNamespace(table=listing))
assert all(
    benchmark[stems[i]] == k
    for k, split in enumerate(package_folds)
    for i in split.test
)

# %% tags=["remove-input"]
moved = {
    words: sum(benchmark[s] != other[s] for s in stems)
    for words, other in (("stem", by_stem), ("number", by_number))
}
Markdown(
    f"The benchmark's list is sorted by the full path, folder first. Sort it by file name instead, which few would "
    f"call a change, and {moved['stem']} of {len(stems)} images are in another fold. Keep the path but sort numbers as numbers, as a "
    f"file browser does, and {moved['number']} are. So `nucseg` carries the list itself, and every run stores a hash "
    "of the names in its training, validation and test parts. A partial copy of the data keeps its folds too."
)

# %% tags=["remove-input"]
by_fold = (
    listing.assign(fold=[benchmark[s] + 1 for s in stems])
    .groupby(["tissue", "fold"])
    .size()
    .unstack(fill_value=0)
)
spread = (by_fold.max(axis=1) - by_fold.min(axis=1)).idxmax()
Markdown(
    "Two limits of this protocol should be known. The folds do not balance tissues: of the "
    f"{by_fold.loc[spread].sum()} images of the {spread}, one fold tests {by_fold.loc[spread].min()} and another "
    f"{by_fold.loc[spread].max()}. And the images of a tissue were cut from one slide, so that slides "
    "very probably lie on both sides of the division. The scores then say how well a model does on more of a slide it "
    "has seen. `splits.leave_one_tissue_out` asks the harder question: how well it does on a tissue it has never seen."
)

# %% [markdown]
# The public code of the benchmark also chooses its checkpoint on the test fold, which makes the score too good.
# Here a validation part is held out of the training folds for that:

# %%
pd.DataFrame(
    {
        split.name: {
            "train": len(split.train),
            "validation": len(split.val),
            "test": len(split.test),
        }
        for split in package_folds
    }
).T

# %% [markdown]
# ## What to look out for in the files
#
# The data set comes with a few oddities. Each of them has broken someone's loader; `datasets.NuInsSeg` knows them.

# %% tags=["remove-input"]
gaps = 0
for _, group in listing.groupby("tissue"):
    numbers = group["stem"].str.extract(r"(\d+)$")[0].astype(int)
    gaps += int(numbers.max() - numbers.min() + 1 > len(numbers))
padded = listing["stem"].str.contains(r"_0\d+$").groupby(listing["tissue"]).any()
other = [
    t
    for t, g in listing.groupby("tissue")
    if not g["stem"].str.startswith(t.replace(" ", "_")).all()
]
Markdown(
    f"""- **Several kinds of masks.** `label masks modify` holds the label maps to score against. The folder `label masks`
  gives each overlap of two nuclei a number of its own, so it counts more objects than there are nuclei. The report's
  code reads the latter.
- **Names.** Two folders are misspelt (`human salivory gland`, `human tonsile`), and in {len(other)} of {len(padded)}
  tissues the file names do not begin with the folder's name. Numbers are zero-padded in {padded.sum()} tissues and
  have gaps in {gaps}. Image and mask must be paired by name, never by their position in two sorted lists: in a
  public copy some masks are exchanged by that very error.
- **Formats.** One image, `human_liver_31`, has a fourth channel. `Thumbs.db` and `.DS_Store` lie among the images.
- **Nuclei in pieces.** Some nuclei consist of more than one connected piece, so relabelling the components of a mask
  changes the truth.
- **Vague areas.** The authors marked regions in which they could not tell. `Sample.vague` has them, so that scores
  with and without them can be compared."""
)

# %% [markdown]
# ## Get the real images
#
# One command downloads NuInsSeg from Zenodo, checks its hash and unpacks it. Run it again to resume an interrupted
# download:
#
# ```sh
# nucseg fetch nuinsseg --out data/nuinsseg
# export NUCSEG_DATA=data/nuinsseg
# ```
#
# In the Windows command prompt the second line is `set NUCSEG_DATA=data\nuinsseg`. For images of your own, two folders
# are enough, `nucseg.ImageFolder("images", "masks")`: `images/x.png` belongs to `masks/x.tif`.

# %% tags=["remove-input"]
Markdown(
    f"The archive has {fetch.ARCHIVE_BYTES / 1e9:.1f} GB, is found at [doi:{fetch.DOI}](https://doi.org/{fetch.DOI}), and "
    "may be used under CC BY 4.0: name its authors."
)

# %% [markdown]
# ## Summary
#
# - A sample is an image and a label map; each nucleus has its own number.
# - Tissues differ in the number, size and crowding of nuclei by large factors. Look at scores by tissue.
# - Nuclei that touch are what makes the task hard for methods that only separate foreground from background.
# - A split is a list of names. A seed without the list does not reproduce it.
# - The synthetic images share the measured statistics of NuInsSeg. They are a stand-in for running the code,
#   not for conclusions about tissue.
#
# ## Further reading
#
# - {cite:t}`mahbod2024nuinsseg` describe how NuInsSeg was made and scored.
# - {cite:t}`kumar2017aji` is an earlier data set with touching nuclei, and the origin of the AJI score.
# - {cite:t}`ruifrok2001quantification` separate stains by optical density.

# %% tags=["remove-input"]
Markdown(f"*This page ran in {time.monotonic() - started:.0f} s.*")
