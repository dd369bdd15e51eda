# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Your own images
#
# You have images of H&E sections and want their nuclei. This chapter segments three of them with the adapter that
# comes with `nucseg`, reads the results back, checks them, fine-tunes on corrected outlines, and says what each step
# costs.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to segment images of any size, to read the tables and polygons that are written, to state the
# pixel size, to score an adapter on your masks, and to fine-tune it on a few images.
#
# **You need**: 8-bit RGB images (PNG, JPEG, TIFF, or a whole slide), and masks of a few of them for the second half.
# No GPU, no download. **Time**: 25 minutes to read, 1 minute to run.
# ```

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tifffile
from IPython.display import Markdown
from PIL import Image

import nucseg
from nucseg.data.synth import generate
from nucseg.inference.batch import predict_files
from nucseg.inference.segmenter import Segmenter
from nucseg.records.provenance import provenance_note
from nucseg.records.quotes import check
from nucseg.records.runs import results_folder
from nucseg.training.finetune import median_diameter, open_own
from nucseg.viz import figures
from nucseg.viz.chapters import beyond, changes, own

figures.use_style()
model = nucseg.load()  # the adapter nuinsseg-all

# %%
Markdown(provenance_note(nucseg.Synthetic(1), model))

# %% [markdown]
# ## Three images
#
# Synthetic tissue stands in for yours. Here are five images of 256 px: three to work with, and two kept back as a
# test. To work on your own images, put them into two such folders instead. Then skip the cells that write synthetic
# images or masks, and the folded cells, which only check this page's text.

# %%
folder = Path(tempfile.mkdtemp())
samples = [generate("mouse kidney", seed, size=256) for seed in range(5)]
for number, sample in enumerate(samples):
    part = folder / ("mine" if number < 3 else "kept")
    (part / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample.image).save(part / "images" / f"{number}.png")
sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))

# %% [markdown]
# ## One line
#
# `nucseg.segment` takes an image of any size, an array or a Pillow image, and returns its {term}`label map`. The
# {term}`adapter` `nuinsseg-all` was trained on 625 of NuInsSeg's 665 images, from the {term}`base` `broad`; the other
# 40 tuned its decoding. No image of NuInsSeg is left to score it on. Its recipe has scores: five runs, each trained on
# four {term}`folds <fold>` and tested on the fifth ([Cross-validation](crossvalidation.ipynb)); the adapters
# `nuinsseg-best-1` to `nuinsseg-best-3` come from three such runs. It has not seen the images of this page, but its
# base was trained on other synthetic tissue.

# %%
labels = nucseg.segment(samples[0].image, model)
print(labels.shape, labels.dtype, "with", labels.max(), "nuclei")

# %% mystnb={"image": {"alt": "Two panels of one synthetic image: its true outlines, and the outlines that the shipped adapter finds without having seen such an image."}, "figure": {"caption": "A synthetic image with its true outlines, and what the shipped adapter finds. The scale bar assumes 0.25 µm/px.", "name": "fig-own-first"}}
own.plot_found(samples[0], found=labels)
plt.show()

# %% [markdown]
# On the command line the same is `nucseg predict IMAGES --out results`, for files and whole folders.
#
# ## A folder, and what is written
#
# `predict_files` is what `nucseg predict` runs. It returns one row per image, and the images that failed with the
# reason.

# %%
results = folder / "results"
segmenter = Segmenter([model], um_per_px=0.25)
summary, failures = predict_files(
    [folder / "mine" / "images"], results, segmenter, progress=False
)
assert not failures
summary[["image", "height_px", "width_px", "nuclei", "area_px_mean"]]

# %%
own.table_files(results, "0")

# %% [markdown]
# When the command runs again, finished images are skipped, an interrupted image resumes, and missing outputs are
# added. **Files that nucseg did not write, or that you changed, are never replaced.** With `--outputs labels,csv`
# only the label map and the table are written.
#
# The table has one row per nucleus, in pixels and, because the pixel size was given, in µm. The origin is the top
# left corner of the image.

# %%
table = pd.read_csv(results / "0.nuclei.csv")
table[
    ["id", "centroid_x_px", "centroid_y_px", "area_px", "area_um2", "solidity"]
].head(3).round(2)

# %% [markdown]
# The polygons are GeoJSON, as QuPath reads and writes it. Read them back, and compute each polygon's area by the
# shoelace formula. The polygons cut the corners of the outermost pixels, so their areas are slightly smaller than
# those in the table.

# %%
polygons = json.loads((results / "0.geojson").read_text())["features"]


def area(ring):
    x, y = np.array(ring).T  # closed: the last point is the first
    return abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2


areas = [area(one["geometry"]["coordinates"][0]) for one in polygons]
ratio = (np.array(areas) / table["area_px"]).describe()[["min", "50%", "max"]]
ratio.rename({"50%": "median"}).round(3).to_frame("area, polygon by table")

# %% mystnb={"image": {"alt": "The overlay that was written for the first of three images: nuclei found by the shipped adapter are outlined in yellow."}, "figure": {"caption": "The overlay written for the first image. The scale bar assumes 0.25 µm/px.", "name": "fig-own-overlay"}}
own.plot_overlay(results / "0.overlay.png")
plt.show()

# %% tags=["hide-input"]
written = tifffile.imread(results / "0.labels.tif")
assert not failures and len(summary) == 3, "three images are segmented"
assert (written == labels).all(), "the label map on disk is that of nucseg.segment"
assert len(polygons) == len(table) == labels.max(), (
    "one polygon and one row per nucleus"
)
assert np.allclose(areas, table["area_px"], rtol=0.01), (
    "areas are smaller by a trace"
)
assert np.allclose(table["area_um2"], table["area_px"] * 0.25**2, rtol=1e-4), (
    "µm from px"
)
assert set(own.FILES) == {p.name[1:] for p in results.glob("0.*")}, (
    "all files are in the table"
)

# %% [markdown]
# ## The pixel size
#
# The network has learnt nuclei at one scale. If an image's {term}`pixel size` is known, from the file or from
# `--um-per-px`, the image is scaled to match the training images; if not, it is assumed to match, with a warning.
# Here is the same image at half the magnification, that is, at 0.5 µm/px, segmented without and with its pixel size,
# and the {term}`PQ <panoptic quality>` of both results:

# %%
half = np.asarray(
    Image.fromarray(samples[0].image).resize((128, 128), Image.Resampling.BOX)
)
truth = samples[0].labels[::2, ::2]
told = {
    "unknown": nucseg.segment(half, model),
    "0.5 µm/px": nucseg.segment(half, model, um_per_px=0.5),
}
pd.Series(
    {name: nucseg.score(truth, found).pq for name, found in told.items()}
).to_frame("PQ").round(3)

# %% mystnb={"image": {"alt": "A synthetic image at half the magnification, twice. With unknown pixel size several nuclei are missed or cut; told 0.5 micrometres per pixel, the outlines fit the nuclei."}, "figure": {"caption": "An image at half the magnification: pixel size unknown, and told (0.5 µm/px). The title counts the nuclei found.", "name": "fig-own-scale"}}
own.plot_scale(half, told, um_per_px=0.5)
plt.show()

# %% [markdown]
# A TIFF file can state its pixel size, as slides do; then no option is needed. If the pixel size of an adapter's
# training images is unknown, `--um-per-px` changes only the units of the results.

# %%
tifffile.imwrite(
    folder / "half.tif",
    half,
    photometric="rgb",
    resolution=(20000, 20000),
    resolutionunit="CENTIMETER",
)  # 20,000 px per cm: 0.5 µm/px
from_file = Segmenter([model]).segment(folder / "half.tif")
bool((from_file == told["0.5 µm/px"]).all())

# %% tags=["hide-input"]
quality = {name: nucseg.score(truth, found).pq for name, found in told.items()}
assert quality["0.5 µm/px"] > quality["unknown"] + 0.05, "the pixel size matters"
assert (from_file == told["0.5 µm/px"]).all(), "a file's pixel size is read"
check("20,000", 1e4 / 0.5)

# %% [markdown]
# ## How good is it on mine?
#
# Outline the nuclei of a few images, then score the adapter on them. Masks are paired with images by file name. They
# can be label maps (TIFF, PNG; 0 outside, one id per nucleus), ROIs from ImageJ, GeoJSON from QuPath, `.npy`,
# Cellpose's `_seg.npy`, HoVer-Net's `.mat`, or one COCO file. A binary mask does not say where one nucleus ends and
# the next begins; if no nuclei touch, pass `--instances components`. The table shows {term}`Dice <Dice coefficient>`,
# {term}`AJI <aggregated Jaccard index>` and PQ of each image that was kept back:

# %%
for number, sample in enumerate(samples):
    masks = folder / ("mine" if number < 3 else "kept") / "masks"
    masks.mkdir(exist_ok=True)
    tifffile.imwrite(masks / f"{number}.tif", sample.labels.astype(np.uint16))

kept = nucseg.ImageFolder(folder / "kept" / "images", folder / "kept" / "masks")
before = nucseg.evaluate(model, kept, range(len(kept)), progress=False)
before[["stem", "dice", "aji", "pq", "nuclei_true", "nuclei_predicted"]].round(3)

# %% [markdown]
# The command is `nucseg evaluate nuinsseg-all --images kept/images --masks kept/masks`. If the scores are good enough
# for your purpose, skip the next section.
#
# ## Correct, and train again
#
# The three images in `mine` now have masks, here the true ones; in practice they are the adapter's own outlines,
# corrected. The page [Predict, correct, train](../corrections.md) shows how, with QuPath and with ImageJ, and how
# to mark what you did not check (*Ignore\**, *Region\**). One call fine-tunes the adapter on them:

# %%
mine = open_own(folder / "mine")
adapter = nucseg.finetune(
    folder / "mine", folder / "run", progress=False, epochs=12
)
history = pd.read_csv(folder / "run" / "history.csv", index_col="epoch")
print(f"median diameter {median_diameter(mine):.1f} px")
history[["train_loss", "val_dice", "val_pq"]].round(3)

# %% [markdown]
# `finetune` measures the median diameter of your nuclei, the number above, and scales the images so that these nuclei
# are as large as those that the adapter was trained on. One of the three images is not used for training: it selects
# the epoch that is kept, so the scores on it are optimistic. Now score the two images that were kept back:

# %%
tuned = nucseg.load(adapter)
after = nucseg.evaluate(tuned, kept, range(len(kept)), progress=False)
scores = {"before": before, "after": after}
pd.DataFrame(
    {name: part[["dice", "aji", "pq"]].mean() for name, part in scores.items()}
).rename(changes.NAMES).round(3)

# %% mystnb={"image": {"alt": "Three panels of one image that was kept back: its true outlines, what the shipped adapter finds, and what the fine-tuned adapter finds, whose outlines fit better."}, "figure": {"caption": "One of the images kept back: truth, the shipped adapter, and the same adapter after fine-tuning on two images. The scale bar assumes 0.25 µm/px.", "name": "fig-own-tuned"}}
own.plot_found(
    samples[3],
    before=nucseg.segment(samples[3].image, model),
    after=nucseg.segment(samples[3].image, tuned),
)
plt.show()

# %% [markdown]
# All three scores rise after a few seconds of training on two images. That is easier here than on real tissue,
# because synthetic images of one tissue resemble each other; the next section has real images. The new adapter is a
# file of under two megabytes; `nucseg predict images --adapter run/best.safetensors --out results-2` uses it. Results
# of two adapters are never mixed in one folder. The command, `nucseg finetune mine --out run`, also prints two scores
# from before training: of the adapter unchanged, and of the adapter told the size of your nuclei. They show whether
# training was needed.

# %% tags=["hide-input"]
assert (after.mean(numeric_only=True) > before.mean(numeric_only=True))[
    ["dice", "aji", "pq"]
].all(), "fine-tuning raises all three scores"
assert adapter.stat().st_size < 2e6, "a file of under two megabytes"
assert len(mine) == 3 and len(history) == 12, "three images, twelve epochs"

# %% [markdown]
# ## What it brings on real images, and what it costs
#
# How much does fine-tuning bring on real images? This was measured on the 107 histology images of BBBC038
# {cite}`caicedo2019bbbc038`, which come from other laboratories and have another magnification than NuInsSeg. The
# bases of the shipped adapters were pretrained on some or all of these images. The experiment therefore started from an
# adapter that was trained on NuInsSeg from random weights and never saw them. The images to learn from were drawn at
# random five times; the other 87 were the same each time and gave the scores.

# %%
about, learnt = own.own_images()
own.table_own_images(about, learnt)

# %% [markdown]
# On average over the five draws, ten images raise PQ from 0.288 to 0.412, five to 0.375 and twenty to 0.454; Dice rises
# from 0.606 to 0.857 with twenty. Stating the size of the nuclei without training does not help here (0.273). It
# matters which images are outlined: with five, PQ lies between 0.341 and 0.404, depending on the draw. On one thread of
# a CPU, training on five, ten and twenty images took 0.3, 0.8 and 2.3 minutes (medians of the five draws); a run stops
# after 20 epochs without improvement. Outlining ten images takes longer than that.

# %% tags=["hide-input"]
mean = learnt.groupby("images")[["dice", "pq"]].mean()
for text, name in (
    ("0.288", "0"),
    ("0.412", "10"),
    ("0.375", "5"),
    ("0.454", "20"),
    ("0.273", "scale only"),
):
    check(text, mean.loc[name, "pq"])
check("0.606", mean.loc["0", "dice"])
check("0.857", mean.loc["20", "dice"])
assert mean.loc["10", "pq"] > mean.loc["0", "pq"] * 4 / 3, "by more than a third"
five = learnt[learnt["images"] == "5"].groupby("draw")["pq"].mean()
check("0.341", five.min())
check("0.404", five.max())
for text, name in (("0.3", "5"), ("0.8", "10"), ("2.3", "20")):
    check(text, np.median(about["seconds"][name]) / 60)
assert (about["data"]["images"], about["test_images"], about["draws"]) == (
    107,
    87,
    5,
)
assert about["start"]["base"] == "random" and about["configs"][0]["patience"] == 20

# %% [markdown]
# ## Another stain, another laboratory
#
# What if the images differ and you do not fine-tune? Three runs answer this in part; their heads differ in
# normalisation only and started from random weights (the recipe study of the chapter
# [Beyond the report](beyond.ipynb)). They were scored on 24 validation images of fold 1 whose {term}`haematoxylin` or
# {term}`eosin` was halved or doubled ({term}`stain shift`).

# %%
stained = own.robustness()
own.table_robustness(stained)

# %%
changes.table(
    own.stain_changes(stained, "group"),
    "A head with GroupNorm: paired differences",
    ("dice", "pq"),
)

# %% [markdown]
# Twice the haematoxylin costs most: 0.075 PQ (0.040 to 0.111, images drawn) for the head with {term}`GroupNorm`, 0.081
# with {term}`BatchNorm` and 0.071 with {term}`LayerNorm`. In PQ the intervals of the other changes contain zero, except
# for the BatchNorm head and eosin: +0.010 when it is halved, −0.028 when it is doubled. With 24 images and one seed,
# this is only a rough guide.
#
# On 24 histology images of BBBC038 the three rank differently from NuInsSeg: PQ is 0.477 with BatchNorm, 0.431 with
# LayerNorm and 0.407 with GroupNorm. Compare these three with each other only, because the base that they share was
# pretrained on these images. BatchNorm and LayerNorm have one property in common: the maps of a nucleus hardly depend
# on the rest of the field. When an image becomes part of a mosaic of four, its maps change by 0.023 at most; with
# GroupNorm they change by up to 0.790.

# %% tags=["hide-input"]
double = {
    norm: own.stain_changes(stained, norm)["haematoxylin × 2"]
    for norm in ("group", "batch", "layer")
}
for text, value in zip(
    ("0.075", "0.111", "0.040"), changes.interval(double["group"]), strict=True
):
    check(text, value)
check("0.081", changes.interval(double["batch"])[0])
check("0.071", changes.interval(double["layer"])[0])
for norm in double:
    for condition, part in own.stain_changes(stained, norm).items():
        _, low, high = changes.interval(part)
        if condition != "haematoxylin × 2" and (norm, condition[:5]) != (
            "batch",
            "eosin",
        ):
            assert low < 0 < high, "the other changes cannot be told from nothing"
eosin = own.stain_changes(stained, "batch")
check("+0.010", changes.interval(eosin["eosin × 0.5"])[0])
check("−0.028", changes.interval(eosin["eosin × 2"])[0])
abroad = (
    stained[stained["condition"] == "BBBC038"].groupby("head_norm")["pq"].mean()
)
for text, norm in (("0.477", "batch"), ("0.431", "layer"), ("0.407", "group")):
    check(text, abroad[norm])
fields = pd.read_csv(results_folder() / "robustness" / "fields.csv")
fields = fields.groupby("head_norm")["greatest"].max()
check("0.023", max(fields["batch"], fields["layer"]))
check("0.790", fields["group"])

# %% [markdown]
# ## Whole slides
#
# The network sees a large image in overlapping fields, and only the core of each field is kept. The maps are then
# decoded block by block. Above 10,000 px memory hardly grows with the image, and empty glass is skipped. The chapter
# [From one slide to an archive](archive.ipynb) works out how long an archive takes.

# %%
large = beyond.about("large-image")
words = {
    "side_px": "side, px",
    "seconds": "seconds",
    "peak_memory_gib": "peak memory, GiB",
    "nuclei": "nuclei",
    "megapixels_a_second": "megapixels a second",
}
row = pd.Series(large)[list(words)].rename(words)
row.map("{:,.6g}".format).to_frame("measured")

# %% [markdown]
# A synthetic image of 20,000 × 20,000 px, in which 83,084 nuclei were found, took 6.5 minutes and 3.7 GiB of memory on
# two threads of a CPU, with all five outputs written. At the same pace a slide of 100,000 × 100,000 px with no glass
# takes under three hours.
#
# An image of that size is cut into overlapping fields. Do they change the result? The head of the default adapter
# has {term}`BatchNorm`, which does not look at the rest of the field, and fields lie on the grid of the encoder's
# attention windows. Two images of 2,048 px show what is left. They would fit into one field of the usual size, so they
# were cut into fields of 1,344 px:

# %%
cuts = beyond.about("seams")
own.table_seams(cuts, "agreement", "compared")

# %% [markdown]
# In fields and all at once the network finds nearly the same: the label maps agree with an AJI of 0.997, on one
# synthetic tissue and on a mosaic of sixteen tissues, the worst case. In all rows but the last of each image, LoRA is
# merged and the maps are stored in steps of 1/255. The last row compares with maps for which neither was done. The AJI
# is 0.998 and 0.990, so both together change the result about as much as fields do, or more.
#
# If the fields are shifted by 160 px, off the grid, each attention window has other surroundings, and the label maps
# agree less, with 0.972 and 0.898. On the mosaic the shifted fields are closer to the truth by AJI, with 0.669 against
# 0.646 in fields and 0.646 all at once, but not by PQ, with 0.693 against 0.697. What happens at the borders between
# fields? Each nucleus below lies on a border in one layout and clear of every border in the other, so it was outlined
# once in each situation.

# %%
own.table_borders(cuts)

# %% [markdown]
# On borders, just as many nuclei are found, and their outlines are not measurably worse: the mean IoU differs by +0.000
# (−0.004 to +0.003, 71 nuclei drawn) on one tissue and by +0.008 (−0.013 to +0.041, 51 nuclei) on sixteen.

# %% tags=["hide-input"]
check("20,000", large["side_px"])
check("83,084", large["nuclei"])
check("6.5", large["seconds"] / 60)
check("3.7", large["peak_memory_gib"])
check("100,000", 1e5)
assert 2.5 < 1e4 / large["megapixels_a_second"] / 3600 < 3, "under three hours"
one, sixteen = cuts["agreement"]["one tissue"], cuts["agreement"]["sixteen tissues"]
at_once = "fields, and the network seeing all of it at once"
check("0.997", one[at_once]["aji"])
check("0.997", sixteen[at_once]["aji"])
check("0.972", one["fields moved by 160 px"]["aji"])
check("0.898", sixteen["fields moved by 160 px"]["aji"])
check("2,048", cuts["side_px"])
check("1,344", cuts["field_px"])
in_steps = "at once, with maps as stored and without merging and rounding"
check("0.998", one[in_steps]["aji"])
check("0.990", sixteen[in_steps]["aji"])
truth_of = cuts["against_truth"]["sixteen tissues"]
check("0.646", truth_of["fields"]["aji"])
check("0.669", truth_of["fields moved by 160 px"]["aji"])
check("0.646", truth_of["the network seeing all of it at once"]["aji"])
check("0.693", truth_of["fields moved by 160 px"]["pq"])
check("0.697", truth_of["fields"]["pq"])
borders = cuts["nuclei_on_borders"].values()
assert all(b["found_crossed"] == b["found_clear"] for b in borders), "as many"
assert [b["nuclei"] for b in borders] == [71, 51]
peaks = pd.read_csv(
    results_folder() / "large-image" / "sizes.csv", index_col="side_px"
)["peak_memory_gib"]
check("10,000", peaks.index[-2])
assert peaks[20_000] < 1.1 * peaks[10_000], "hardly grows"
for text, b in zip(("+0.000", "+0.008"), borders, strict=True):
    check(text, b["iou_crossed"] - b["iou_clear"])
ends = [b["iou_difference_interval"] for b in borders]
for texts, interval in zip(
    (("−0.004", "+0.003"), ("−0.013", "+0.041")), ends, strict=True
):
    for text, end in zip(texts, interval, strict=True):
        check(text, end)

# %% [markdown]
# ## Options worth knowing
#
# `nucseg predict --help` lists them all; the page [The command line](../cli.md) has the same text.
#
# | for | option |
# |---|---|
# | folders within folders | `--recursive` |
# | fewer files | `--outputs labels,csv` (also `geojson`, `overlay`, `rois`) |
# | an unstated pixel size | `--um-per-px 0.5` |
# | a slide with several images | `--series 2`; by default the largest |
# | slides whose tissue is pale | `--no-tissue-mask`; by default empty glass is skipped |
# | fewer doubtful nuclei | `--min-confidence 0.5`, with adapters that were tuned (preset `best`), as the default one was: they write each nucleus's confidence into the table and QuPath's measurements |
# | haematoxylin much weaker or stronger than usual | `--adapter nuinsseg-strong-1`, trained with simulated stains, half to double the haematoxylin and eosin ([Beyond the report](beyond.ipynb)) |
# | touching nuclei cut too often, or too rarely | a lower or a higher `--ridge` |
# | a little more quality for four times the time | `--tta`; several `--adapter` average an {term}`ensemble` |
# | more speed on a CPU | `pip install "nucseg[openvino]"`, then `--engine auto` uses it for large images |
# | several processes, or a cluster | `--on local --jobs 4`, `--on slurm` |
# | Fiji, QuPath's DJL, ONNX Runtime | `nucseg export --out model` writes ONNX, TorchScript and a bioimage.io package |
#
# What `--tta`, ensembles and the confidence bring is measured in [Beyond the report](beyond.ipynb).
#
# ## Summary
#
# - `nucseg.segment(image)` for one image, `nucseg predict` for folders and slides; files that are yours are never
#   replaced.
# - State the pixel size. In the example above, a scan at half the magnification was segmented worse without it.
# - Keep some masks back, and score before and after. The images that select the epoch are no test.
# - A few corrected images can bring a lot: on images of other laboratories, training on ten raised PQ by more than a
#   third.
# - Of the stain shifts tried, twice the haematoxylin cost most. Training with stronger changes of the stain makes up
#   for part of that, and for more where haematoxylin is halved ([Beyond the report](beyond.ipynb)).
#
# ## Exercises

# %% [markdown]
# ```{exercise} Nothing found
# :label: ex-own-nothing
# `nucseg predict` finds hardly any nuclei in a scan with 1 µm/px. The file does not state its pixel size. What do you
# do?
# ```

# %% [markdown]
# ```{solution} ex-own-nothing
# :class: dropdown
# Run it again with `--um-per-px 1` and a new `--out` folder. The network then sees the image enlarged four times, so
# that nuclei are as large as in its training images.
# ```

# %% [markdown]
# ```{exercise} An honest score
# :label: ex-own-honest
# You fine-tune on ten images. In the epoch that is kept, the validation PQ is 0.5. Why should you not report this
# score, and which one should you report?
# ```

# %% [markdown]
# ```{solution} ex-own-honest
# :class: dropdown
# The validation images selected the epoch, so their score is optimistic, the more so the fewer they are. Report the
# score on images that were used neither for training nor for selecting the epoch.
# ```

# %% [markdown]
# ```{exercise} Which nuclei are large?
# :label: ex-own-table
# From the tables of the three images, list the nuclei whose area is more than twice the median of their image. Are
# they likely to be {term}`mergers <merger>`? Look at their solidity, the area divided by that of the convex hull: it
# is close to 1 for a single nucleus, and lower for most pairs of merged nuclei.
# ```

# %% [markdown]
# ```{solution-start} ex-own-table
# :class: dropdown
# ```

# %%
tables = pd.concat(
    pd.read_csv(path).assign(image=path.name[0])
    for path in results.glob("*.nuclei.csv")
)
median = tables.groupby("image")["area_px"].transform("median")
large_ones = tables[tables["area_px"] > 2 * median]
print(large_ones[["image", "id", "area_px", "solidity"]].round(2))
assert (large_ones["area_px"] > tables["area_px"].median()).all()

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} Draw the polygons
# :label: ex-own-polygons
# Turn the GeoJSON of the first image back into a label map with `skimage.draw.polygon`, and compare it with
# `0.labels.tif`. Does the coordinate 0 of these polygons lie in the middle of the first pixel or at its corner? (In
# `skimage`, whole coordinates are pixel centres.)
# ```

# %% [markdown]
# ```{solution-start} ex-own-polygons
# :class: dropdown
# ```

# %%
from skimage.draw import polygon

drawn = np.zeros_like(labels)
for number, one in enumerate(polygons, start=1):
    x, y = np.array(one["geometry"]["coordinates"][0]).T
    drawn[polygon(y - 0.5, x - 0.5, drawn.shape)] = (
        number  # origin: a corner, not a centre
    )
agreement = nucseg.score(labels, drawn)
print(round(agreement.dice, 3), round(agreement.pq, 3))
assert agreement.pq > 0.99  # the corner of the top left pixel is (0, 0)

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} How wrong may the pixel size be?
# :label: ex-own-wrong
# Segment the second image with pixel sizes from half to twice the true one, and compare the PQs. How much error does
# the adapter tolerate?
# ```

# %% [markdown]
# ```{solution-start} ex-own-wrong
# :class: dropdown
# ```

# %%
second = samples[1]
forgiven = {
    factor: nucseg.score(
        second.labels, nucseg.segment(second.image, model, um_per_px=0.25 * factor)
    ).pq
    for factor in (0.5, 0.8, 1.0, 1.25, 2.0)
}
print({factor: round(pq, 2) for factor, pq in forgiven.items()})
assert forgiven[1.0] > forgiven[0.5]

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} A correction by code
# :label: ex-own-correct
# Remove the polygons with a solidity of at most nine tenths from the GeoJSON of the three images (each feature has it
# in `properties["measurements"]`). Save the rest as masks in a new folder, with copies of the images. Does
# `open_own`, the function with which `finetune` reads masks, find the remaining nuclei?
# ```

# %% [markdown]
# ```{solution-start} ex-own-correct
# :class: dropdown
# ```

# %%
import shutil

loop, left = folder / "loop", {}
shutil.copytree(folder / "mine" / "images", loop / "images", dirs_exist_ok=True)
(loop / "masks").mkdir(exist_ok=True)
for path in sorted(results.glob("*.geojson")):
    drawing = json.loads(path.read_text())
    drawing["features"] = [
        one
        for one in drawing["features"]
        if one["properties"]["measurements"]["solidity"] > 0.9
    ]
    (loop / "masks" / path.name).write_text(json.dumps(drawing))
    left[path.stem] = len(drawing["features"])
read = open_own(loop)
print(left)
assert [read[i].labels.max() for i in range(3)] == list(left.values())

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ## Further reading
#
# - {cite:t}`caicedo2019bbbc038` for the second data set.
# - [Predict, correct, train](../corrections.md) for the loop with QuPath and ImageJ, and [fine-tuning](finetuning.ipynb) for
#   what happens inside.
