# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # Your own images

# %% tags=["hide-input"]
import json
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tifffile
from IPython.display import Markdown
from PIL import Image

import nucseg
from nucseg.data.datasets import ImageFolder
from nucseg.data.synth import Synthetic
from nucseg.inference.batch import predict_files
from nucseg.inference.evaluate import evaluate
from nucseg.inference.segmenter import Segmenter, load
from nucseg.metrics import score
from nucseg.records.provenance import provenance_note
from nucseg.records.runs import results_folder
from nucseg.records.statistics import difference
from nucseg.training.finetune import finetune, median_diameter, open_own
from nucseg.viz import figures

started = time.monotonic()
figures.use_style()
tissues = ("human kidney", "mouse kidney")
stand_in = Synthetic(n_per_tissue=8, size=320, seed=11, tissues=tissues)
model = load()
Markdown(provenance_note(stand_in, model))

# %% [markdown]
# ## Overview
#
# This page is for the day after the report: you have images of your own and want their nuclei. First with the adapter
# that comes with nucseg, then with one that has learnt from ten of your images, and last in QuPath, ImageJ or a
# spreadsheet. Every step is run here, on synthetic tissue that stands in for yours. To see it on yours, open this page
# as a notebook, name your folder in the next cell, and run all cells; the captions will still speak of the stand-in.

# %%
mine = ""  # your folder, with images/ and masks/ in it; "" is synthetic tissue
source = open_own(mine) if mine else stand_in

# %% [markdown]
# ## What you need
#
# Images of H&E sections, 8 bit RGB: PNG, JPEG or TIFF, pyramids included, of any size. For the second part, masks of
# five to fifty of them: label maps, or ROIs drawn in ImageJ. No GPU.
#
# ## Three lines
#
# The adapter `nuinsseg-1` was trained on the training images of NuInsSeg's first fold, from the base `offline`.
# `nucseg.segment` takes an image of any size and returns its label map.

# %%
sample = source[min(9, len(source) - 1)]
labels = nucseg.segment(sample.image)
labels.shape, labels.dtype, int(labels.max())

# %% mystnb={"image": {"alt": "Two panels of one synthetic image: its true outlines, and the outlines that the adapter that comes with nucseg finds without having seen such an image."}, "figure": {"caption": "An image of the stand-in with its true outlines, and what the adapter finds that comes with nucseg. The scale bar assumes 0.25 µm a pixel.", "name": "fig-own-first"}} tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.6))
figures.overlay(sample.image, sample.labels, left)
left.set_title(f"Truth: {sample.labels.max()} nuclei")
figures.scale_bar(left)
figures.overlay(sample.image, labels, right)
right.set_title(f"Found: {labels.max()}, PQ {score(sample.labels, labels).pq:.2f}")
plt.show()

# %% [markdown]
# If that is good enough, skip the next two sections.
#
# ## Bring ten images
#
# A folder with `images` and `masks` in it, files paired by their names. In ImageJ or Fiji: draw each nucleus,
# press `t` to add it to the ROI manager, and save all of them (*More » Save*) as a zip under the image's name. Label maps
# from any other program work as they are: TIFF or PNG, 0 outside and a number for each nucleus.
# Keep some of your images back, about a third: they will tell what the rest has taught.
#
# :::{dropdown} From QuPath
# Outline the nuclei as annotations, then run this in *Automate » Script editor*, as
# [QuPath's manual](https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html) does it; it writes a
# label map under the image's name into the project's folder `masks`.
#
# ```groovy
# import qupath.lib.images.servers.LabeledImageServer
#
# def imageData = getCurrentImageData()
# def labels = new LabeledImageServer.Builder(imageData)
#     .backgroundLabel(0, ColorTools.BLACK)
#     .useInstanceLabels()
#     .multichannelOutput(false)
#     .build()
# def folder = buildFilePath(PROJECT_BASE_DIR, "masks")
# mkdirs(folder)
# def name = GeneralTools.getNameWithoutExtension(getProjectEntry().getImageName())
# writeImage(labels, buildFilePath(folder, name + ".tif"))
# ```
# :::

# %%
folder = Path(mine, "nucseg") if mine else Path(tempfile.mkdtemp())
for part in ("own/images", "own/masks", "kept/images", "kept/masks"):
    (folder / part).mkdir(parents=True, exist_ok=True)
names = (source.table["tissue"] + "_" + source.table["stem"]).str.lstrip("_")
for i, name in enumerate(names if mine else range(len(names))):
    part = "own" if i % 8 < 5 else "kept"  # of 16: 10 to learn from, 6 to check
    one = source[i]
    Image.fromarray(one.image).save(folder / part / "images" / f"{name}.png")
    tifffile.imwrite(
        folder / part / "masks" / f"{name}.tif", one.labels.astype(np.uint16)
    )
own = open_own(folder / "own")
if mine:
    print(f"Everything that follows is written into {folder}")
len(own), f"median diameter {median_diameter(own):.1f} px"

# %% [markdown]
# ## Get an adapter
#
# One command, `nucseg finetune FOLDER --out run`, or one call. It measures how large your nuclei are and shows the
# images to the network at a scale at which they are as large as those that it knows. Two of the ten images are not
# trained on: they choose the epoch that is kept. At the end the command says what the adapter scored as it was, when told
# the scale at which nuclei have the size it knows (`--um-per-px`), and after fine-tuning.

# %%
clock = time.monotonic()
budget = (
    {} if mine else {"epochs": 8}
)  # a page must build quickly; {} is the default
adapter = finetune(folder / "own", folder / "run", progress=False, **budget)
seconds = time.monotonic() - clock
history = pd.read_csv(folder / "run" / "history.csv").set_index("epoch")
best = history["val_pq"].idxmax()
shown = history.loc[sorted({1, best, len(history)})]
shown = shown[["train_loss", "val_dice", "val_aji", "val_pq"]].round(3)
shown.rename(index={best: f"{best}, kept"})

# %% [markdown]
# ## Check it
#
# On images that neither trained nor chose anything. `nucseg evaluate nuinsseg-1` and `nucseg evaluate
# run/best.safetensors`, with `--images` and `--masks`, do the same from the command line.

# %%
kept = ImageFolder(folder / "kept/images", folder / "kept/masks")
tuned = load(adapter)
before, after = (
    evaluate(one, kept, range(len(kept)), progress=False) for one in (model, tuned)
)
pd.DataFrame(
    {
        "before": before.mean(numeric_only=True),
        "after": after.mean(numeric_only=True),
    }
).loc[["dice", "aji", "pq"]].round(3)

# %% tags=["remove-input"]
size = adapter.stat().st_size / 1e6
gain = after["pq"].mean() - before["pq"].mean()
Markdown(
    f"""{seconds:.0f} s of training on {len(own)} images changed PQ on the {len(kept)} kept images by {gain:+.2f}. The
adapter is a file of {size:.1f} MB."""
    + (
        ""
        if mine
        else """ With the default budget it would have learnt for longer; here the page should not take
too long to build."""
    )
)

# %% [markdown]
# ## Use it
#
# `nucseg predict IMAGES --adapter run/best.safetensors --out segmented` takes files and folders, resumes after an
# interruption, and needs no more memory for a whole slide than for a small image. Pass `--um-per-px` if the file does
# not state its pixel size and the adapter knows that of its training images.

# %%
summary, failures = predict_files(
    [folder / "kept/images"],
    folder / "segmented",
    Segmenter([tuned]),
    progress=False,
)
summary[["image", "height_px", "width_px", "nuclei", "area_px_mean"]]

# %% tags=["hide-input"]
first = kept.table["stem"][0]
files = sorted((folder / "segmented").glob(f"{first}.*"))
what = {
    ".geojson": "polygons; QuPath: File » Import objects from file",
    ".json": "how it was made: adapter, settings, hashes",
    ".labels.tif": "label map; ImageJ, napari, scikit-image",
    ".nuclei.csv": "one row per nucleus: place, size, shape, haematoxylin",
    ".overlay.png": "the image with its nuclei outlined",
    ".rois.zip": "ImageJ: File » Open, or drag it onto the ROI manager",
}
table = pd.DataFrame(
    [
        (
            f.name,
            f"{f.stat().st_size / 1024:.0f} KiB",
            what[f.name.removeprefix(first)],
        )
        for f in files
    ],
    columns=["file", "size", "what it is for"],
)
table.style.hide(axis="index").set_caption("What is written for one image")

# %%
pd.read_csv(folder / "segmented" / f"{first}.nuclei.csv").head(4).round(2)

# %% mystnb={"image": {"alt": "The overlay that was written for one image: the nuclei found by the fine-tuned adapter are outlined in yellow."}, "figure": {"caption": "The overlay written for the first of the kept images. The scale bar assumes 0.25 µm a pixel.", "name": "fig-own-overlay"}} tags=["hide-input"]
overlay = np.asarray(Image.open(folder / "segmented" / f"{first}.overlay.png"))
figure, ax = plt.subplots(figsize=(figures.WIDTH / 1.6, figures.WIDTH / 1.6))
ax.imshow(overlay)
ax.set_axis_off()
figures.scale_bar(ax)
plt.show()

# %% [markdown]
# ## What it brings on real images
#
# The stand-in is synthetic. Measured on real ones: the 107 histology images of BBBC038 {cite}`caicedo2019bbbc038`,
# of other laboratories and another magnification than NuInsSeg. The base `offline` was trained on those very images,
# so it would have an unfair start; the numbers below are of an adapter trained on NuInsSeg from the base `random`,
# which never saw them.

# %% tags=["remove-input"]
recorded = results_folder() / "own-images"
if (recorded / "run.json").exists():
    about = json.loads((recorded / "run.json").read_text())
    scores = pd.read_csv(recorded / "scores.csv", dtype={"images": str})
    rows = []
    for name in ("0", "scale only", "5", "10", "20"):
        group = scores[scores["images"] == name]
        by_draw = group.groupby("draw")["pq"].mean()
        label = {
            "0": "none: the adapter as it is",
            "scale only": "none, but told the size of the nuclei",
        }
        ran = [
            c["epochs_run"] for c in about["configs"] if str(c["images"]) == name
        ]
        rows.append(
            {
                "images learnt from": label.get(name, name),
                "Dice": f"{group['dice'].mean():.3f}",
                "AJI": f"{group['aji'].mean():.3f}",
                "PQ": f"{group['pq'].mean():.3f}",
                "PQ, lowest and highest draw": f"{by_draw.min():.3f}, {by_draw.max():.3f}",
                "epochs": f"{min(ran)} to {max(ran)}" if ran else "",
                "minutes": f"{np.median(about['seconds'][name]) / 60:.1f}"
                if name in about["seconds"]
                else "",
            }
        )
    shown = (
        pd.DataFrame(rows)
        .style.hide(axis="index")
        .set_caption(
            f"BBBC038's histology images: means over {about['draws']} draws of the images to learn from, each scored on the "
            f"{about['test_images']} images that were not drawn"
        )
    )
else:
    shown = Markdown("*`experiments/own_images.py` has not been run here.*")
shown

# %% tags=["remove-input"]
if (recorded / "run.json").exists():
    mean = scores.groupby("images")["pq"].mean()
    line = f"""**Behind this table:** {about["data"]["name"]}, {about["data"]["note"]} · start: {about["start"]["name"]} ·
device: {about["device"]} · commit {about["commit"][:7]}, {about["date"][:10]} · `{about["command"]}`

Over {about["draws"]} draws, ten images change PQ from {mean["0"]:.3f} to {mean["10"]:.3f}; telling the size of the nuclei alone
brings it to {mean["scale only"]:.3f}. Five images reach {mean["5"]:.3f}, twenty {mean["20"]:.3f}. Which images one outlines
matters: look at the lowest and highest draw. A run ends when {about["configs"][0]["patience"]} epochs in a row have not been better on the few
images that choose, so the epochs differ."""
else:
    line = ""
Markdown(line) if line else None

# %% [markdown]
# ## Mirrored views and ensembles
#
# `--tta` segments four mirrored views of everything and averages; several `--adapter` options average several
# adapters. Both cost time. What they bring was measured on the first fold of NuInsSeg:

# %% tags=["remove-input"]
recorded = results_folder() / "options"
if (recorded / "run.json").exists():
    about = json.loads((recorded / "run.json").read_text())
    table = pd.read_csv(recorded / "scores.csv")
    ways = dict(list(table.groupby("way", sort=False)))
    one = ways["one adapter"]
    rows = []
    for name, group in ways.items():
        row = {
            "way": name,
            "AJI": f"{group['aji'].mean():.3f}",
            "PQ": f"{group['pq'].mean():.3f}",
        }
        if name != "one adapter":
            pq = difference(group, one).loc["pq"]
            row["change of PQ (95% interval)"] = (
                f"{pq['difference']:+.3f} ({pq['low']:+.3f} to {pq['high']:+.3f})"
            )
        rows.append(
            row | {"seconds per image": f"{about['seconds_per_image'][name]:.2f}"}
        )
    shown = (
        pd.DataFrame(rows)
        .fillna("")
        .style.hide(axis="index")
        .set_caption(
            f"Averaging, {about['data']['images']} test images of NuInsSeg, {about['device']}, {about['date'][:10]}"
        )
    )
else:
    shown = Markdown("*`experiments/options.py` has not been run here.*")
shown

# %% [markdown]
# ## Whole slides
#
# The image is cut into overlapping fields of the size that the network was trained on; only their cores are kept.

# %% tags=["remove-input"]
recorded = results_folder() / "large-image" / "run.json"
if recorded.exists():
    large = json.loads(recorded.read_text())
    text = f"""A synthetic image of {large["side_px"]:,} x {large["side_px"]:,} px took {large["seconds"] / 60:.0f} minutes and
{large["peak_memory_gib"]:.1f} GiB of memory ({large["device"]}, {large["date"][:10]}, commit {large["commit"][:7]}; other
programs ran beside it). {large["nuclei"]:,} nuclei were written as a label map, polygons, ROIs and a table."""
else:
    text = "*`benchmarks/large_image.py` has not been run here.*"
Markdown(text)

# %% [markdown]
# The label map is cut from the fields' maps block by block, and that changes nothing. What the network says about a
# nucleus does depend on what else is in the field: it normalises over all of it, and its attention looks through windows
# that begin at the field's corner. So the same image with its fields laid elsewhere, or seen at once, gives a slightly
# different label map; where one field holds quite different tissues, a very different one.

# %% tags=["remove-input"]
recorded = results_folder() / "seams" / "run.json"


def shown_seams(about: dict, key: str, first: str, caption: str):
    rows = [
        {"image": image, first: name}
        | {word: row[word.lower()] for word in ("Dice", "AJI", "PQ")}
        for image, pairs in about[key].items()
        for name, row in pairs.items()
    ]
    return (
        pd.DataFrame(rows)
        .style.hide(axis="index")
        .format(dict.fromkeys(["Dice", "AJI", "PQ"], "{:.3f}"))
        .set_caption(
            f"{caption}: one synthetic image of {about['side_px']:,} px each ({about['device']}, "
            f"{about['date'][:10]}, commit {about['commit'][:7]})"
        )
    )


cuts = json.loads(recorded.read_text()) if recorded.exists() else {}
shown = Markdown("*`experiments/seams.py` has not been run here.*")
if cuts:
    shown = shown_seams(
        cuts, "agreement", "compared", "Two label maps against each other"
    )
shown

# %% [markdown]
# Which of them is right? The next table holds each against the truth. On one tissue they are level: the differences are
# nuclei that could be drawn either way. On the mosaic the fields win, because each tissue is normalised by itself; to
# agree with what the network says of the whole image would be to agree with the worse answer. Still, cut-outs of one
# slide are best compared under one choice of fields.

# %% tags=["remove-input"]
shown = Markdown("")
if "against_truth" in cuts:
    shown = shown_seams(
        cuts, "against_truth", "segmented in", "Label maps against the truth"
    )
shown

# %% [markdown]
# And the borders themselves? Each nucleus below lies on a border between two fields in one layout and clear of every
# border in the other, so both layouts drew the same nucleus, once cut and once whole.

# %% tags=["remove-input"]
shown = Markdown("")
if "nuclei_on_borders" in cuts:
    rows = [
        {
            "image": image,
            "nuclei": row["nuclei"],
            "found, on a border": f"{row['found_crossed']:.1%}",
            "found, clear of it": f"{row['found_clear']:.1%}",
            "IoU, on a border": f"{row['iou_crossed']:.3f}",
            "IoU, clear of it": f"{row['iou_clear']:.3f}",
            "difference (95% interval)": f"{row['iou_crossed'] - row['iou_clear']:+.3f} "
            "({:+.3f} to {:+.3f})".format(*row["iou_difference_interval"]),
        }
        for image, row in cuts["nuclei_on_borders"].items()
    ]
    shown = (
        pd.DataFrame(rows)
        .style.hide(axis="index")
        .set_caption(
            "The same nuclei on a border and clear of it: mean IoU with the truth, and the share found (IoU above "
            f"0.5); nuclei drawn for the interval ({cuts['device']}, {cuts['date'][:10]}, commit {cuts['commit'][:7]})"
        )
    )
shown

# %% tags=["remove-input"]
recorded = results_folder() / "throughput" / "run.json"
if recorded.exists():
    fast = json.loads(recorded.read_text())
    rows = fast["rows"]
    mean = {
        who: sum(r[f"seconds_{who}"] for r in rows) / len(rows)
        for who in ("nucseg", "nucseg_own", "generator")
    }
    text = f"""Beside MobileSAM's own automatic mask generator, which asks its mask decoder about a grid of points, one after
another: {mean["nucseg"]:.2f} s for an image of 512 px against {mean["generator"]:.0f} s, {fast["ratio"]:.0f} times as fast, both in
float32, on the same {len(rows)} images, base and machine ({fast["device"]}, {fast["date"][:10]}, commit
{fast["commit"][:7]}). In {fast["own_precision"]}, which nucseg takes here by itself, it is {mean["nucseg_own"]:.2f} s. nucseg
finds {sum(r["nuclei_nucseg"] for r in rows)} nuclei where there are {sum(r["nuclei_true"] for r in rows)}, the generator
{sum(r["masks_generator"] for r in rows)} masks; with the base `{fast["base"]["name"]}` its decoder was never trained, so
its count means nothing and only its time does."""
else:
    text = "*`benchmarks/throughput.py` has not been run here.*"
Markdown(text)

# %% [markdown]
# ## Summary
#
# - `nucseg.segment(image)` for one image, `nucseg predict` for folders and slides.
# - Where that is not enough, outline a few images of your own, fine-tune, and keep some back to check.
# - Everything that is written names the adapter, its hash and the settings it was made with.
#
# ## Further reading
#
# - {cite:t}`caicedo2019bbbc038` for the second dataset.
# - The page on {doc}`fine-tuning <finetuning>` for what happens inside, and the {doc}`commands <../cli>` for all options.

# %% tags=["remove-input"]
Markdown(f"*This page ran in {time.monotonic() - started:.0f} s.*")
