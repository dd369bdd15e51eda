# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # From one slide to an archive
#
# Segmenting one image takes a moment. But the archive of a hospital, or a public collection such as The Cancer Genome
# Atlas, holds slides by the thousand; this chapter assumes eleven thousand. It measures where the time for one image
# goes. From recorded speeds it works out how much computing time, memory and storage an archive needs, and it shows
# the one command that starts the work.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to time the stages of a segmentation, to calculate the memory that an image needs, to turn a
# measured speed into core hours for an archive, and to divide the work among the jobs of a cluster.
#
# **You need**: the chapters [The data: nuclei in stained tissue](data.ipynb) and [Your own images](own.ipynb).
# **Time**: 20 minutes to read, 1 minute to run.
# ```

# %%
import json
import tempfile
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown
from PIL import Image

from nucseg.data.synth import Synthetic
from nucseg.images import export
from nucseg.images.slides import open_slide
from nucseg.inference.fields import MARGIN, SIDES, spans
from nucseg.inference.segmenter import Segmenter, load
from nucseg.instances import decode
from nucseg.records.provenance import provenance_note
from nucseg.records.quotes import check
from nucseg.records.runs import results_folder
from nucseg.studies.launch import slurm_options
from nucseg.viz import figures
from nucseg.viz.chapters import archive

figures.use_style()
results = results_folder()
dataset = Synthetic(n_per_tissue=1, seed=0)
model = load("nuinsseg-1", device="cpu")

# %%
Markdown(provenance_note(dataset, model))

# %% [markdown]
# ## How fast it is
#
# Two speeds of a CPU are recorded in the repository. The first is that of
# {py:func}`nucseg.segment <nucseg.inference.segmenter.segment>` on images of 512 px that are in memory already, on one
# thread. The second is that of `nucseg predict` on one synthetic image of 20,000 px, from an image file to five
# outputs, on two threads. To compare them, express both in megapixels per CPU second:

# %%
throughput = json.loads((results / "throughput" / "run.json").read_text())
large = json.loads((results / "large-image" / "run.json").read_text())


def megapixels_per_second(side_px, seconds):
    return side_px**2 / 1e6 / seconds


in_memory = {
    precision: megapixels_per_second(
        512, np.mean([row[key] for row in throughput["rows"]])
    )
    for precision, key in {
        "float32": "seconds_nucseg",
        "bfloat16": "seconds_nucseg_own",
    }.items()
}
from_file_to_files = megapixels_per_second(large["side_px"], large["cpu_seconds"])

# %% [markdown]
# Small images in memory are segmented at 1.03 megapixels per second in float32 and at 1.75 in bfloat16 (two synthetic
# images). The large image reaches 0.60 per CPU second. With two threads that is 1.03 per second of the clock, which the
# figure of all recorded speeds shows:

# %% mystnb={"image": {"alt": "Horizontal bars of recorded speeds in megapixels per second: file to files on two CPU threads and float32 on one are the slowest, the three precisions on a GPU are the fastest at about 3.5."}, "figure": {"caption": "Recorded speeds. `python -m benchmarks.engines` adds the bars of your machine.", "name": "fig-archive-speeds"}}
archive.plot_speeds(archive.recorded_speeds(results))
plt.show()

# %% [markdown]
# The graphics card shows where the limit lies. On an H200 the network alone runs at 68 to 76 megapixels per second,
# more than ten times as fast as on 16 CPU threads beside it. But a whole call of `segment` reaches 3.59 at most, so the
# network is about a twentieth of it. The rest is reading, transfers and, mostly, decoding, which uses one CPU core for
# an image of this size. A faster network would save next to nothing there.
#
# How much faster is `segment` on one CPU thread than the report's design, which enlarges each image to 1,024 px, merges
# nothing and cuts at a threshold? Both segmented the same synthetic images of 512 px, the report's design with random
# weights, in seven turns. Their CPU seconds are compared:

# %%
ends = json.loads((results / "end-to-end" / "run.json").read_text())["rows"]
archive.table_end_to_end(ends)

# %% [markdown]
# In float32 `segment` is 5.4 times as fast, with OpenVINO 6.1 times; in bfloat16 it is 4.7 and 5.7 times. A quarter of
# the pixels would explain 4 times. The encoder alone gains 1.3 times from nucseg's code and 1.9 times with OpenVINO
# (float32, 1,024 px); the larger head and the decoding take part of that back.
#
# The large image was also segmented in bfloat16, the default on that machine, yet at only about a third of the speed.
# Three reasons are known. First, the adapters differ: `nuinsseg-1`, with which the small images were segmented, reduces
# 512 px to 384 px, while the default adapter `nuinsseg-all` does not, so its network sees 1.78 times as many pixels.
# Second, files are read and written, which the next section looks at. Third, fields overlap: the network sees a large
# image in *fields*, and only the core of each field is kept, so that every pixel is predicted with its surroundings in
# view. `spans` lays the fields along one side of an image:


# %%
def times_seen(side_px, **layout):
    """How often the network sees a pixel: area of the fields by that of the image."""
    return (sum(span.side for span in spans(side_px, **layout)) / side_px) ** 2


small_fields = times_seen(20_000, sides=[512], margin=64, grid=16)
large_fields = times_seen(20_000)
print(f"512 px: {small_fields:.2f}, {spans(20_000)[0].side} px: {large_fields:.2f}")

# %% [markdown]
# With fields of 512 px the network sees each pixel 1.78 times on average. Heads that do not normalise over the field
# ({term}`LayerNorm` or {term}`BatchNorm` instead of {term}`GroupNorm`) can use larger fields, as the recorded run did:
# with 2,240 px each pixel is seen 1.24 times, so the network has 30% less to do.
#
# An early version of nucseg, with fields of 512 px and `nuinsseg-1`, took 9.9 minutes for the same image on the same
# machine, 1.5 times as long by the clock and 1.3 times in CPU seconds. Overlap alone does not explain this: its network
# saw fewer pixels, because of the reduction to 384 px, and the rest of the code has become faster, too.

# %% tags=["hide-input"]
check("20,000", large["side_px"])
check("1.03", in_memory["float32"])
check("1.75", in_memory["bfloat16"])
check("0.60", from_file_to_files)
check("1.03", large["megapixels_a_second"])
check("1.78", small_fields)
check("1.24", large_fields)
check("2,240", spans(20_000)[0].side)
check("30%", 1 - large_fields / small_fields)
check("9.9", large["before"]["seconds"] / 60)
check("1.5", large["before"]["seconds"] / large["seconds"])
check("1.3", large["before"]["cpu_seconds"] / large["cpu_seconds"])
assert (throughput["adapter"], model.config.size) == ("nuinsseg-1", 384)
assert large["adapter"] == "nuinsseg-all"
reduced = (512 / model.config.size) ** 2
check("1.78", reduced)
assert small_fields / reduced < large_fields, "the early version's network saw less"
assert "1 thread" in throughput["device"] and "2 threads" in large["device"]
engines = pd.read_csv(results / "engines" / "throughput.csv")
on_gpu = engines["device"] == "NVIDIA H200"
check("68", engines.loc[on_gpu, "network_megapixels_a_second"].min())
check("76", engines.loc[on_gpu, "network_megapixels_a_second"].max())
check("3.59", engines.loc[on_gpu, "megapixels_a_second"].max())
network = engines["network_megapixels_a_second"]
assert network[on_gpu].min() > 10 * network[~on_gpu].max(), "ten times as fast"
for text, name in (
    ("5.4", "torch, float32"),
    ("6.1", "openvino, float32"),
    ("4.7", "torch, bfloat16"),
    ("5.7", "openvino, bfloat16"),
):
    check(text, ends[name]["ratio"])
encoder = json.loads((results / "encoder-speed" / "run.json").read_text())
check("1.3", encoder["ratios"]["torch, float32"]["ratio"])
check("1.9", encoder["ratios"]["OpenVINO, float32"]["ratio"])
check("1,024", encoder["side_px"])
assert 0.28 < from_file_to_files / in_memory["bfloat16"] < 0.38, "about a third"

# %% [markdown]
# ## Where the time goes
#
# A timer of four lines is enough to find out. The dictionary `seconds` collects the time of each `with` block:

# %%
seconds = {}


@contextmanager
def timed(stage):
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


# %% [markdown]
# The test image is a mosaic of four synthetic tissues, 1,024 px wide, saved as a PNG file. The stages of
# `nucseg predict` then run one after the other: read the file, run the network, decode its {term}`target maps` into
# nuclei, measure and outline each nucleus, and write the files.

# %%
tiles = [dataset[i].image for i in (0, 8, 16, 24)]
mosaic = np.concatenate(
    [np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)]
)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "mosaic.png"
Image.fromarray(mosaic).save(path)

segmenter = Segmenter([model], engine="torch")
how = segmenter.decoding()
segmenter.maps([mosaic[:256, :256]], model)  # the first call prepares the network
with timed("read"), open_slide(path) as slide:
    image = slide.read(0, 0, *slide.shape)
with timed("network"):
    [maps] = segmenter.maps([image], model)
with timed("decode"):
    labels = decode(
        maps, how.threshold, how.ridge, segmenter.smallest(), segmenter.smooth()
    )
with timed("measure"):
    block = export.Block(0, 0, labels, labels.max())
    table, features, rois = export.export_block(block, slide, "mosaic")
with timed("write"):
    export.write_labels(path.with_suffix(".tif"), labels, labels.max())
    table.to_csv(path.with_suffix(".csv"), index=False)
    path.with_suffix(".geojson").write_text(json.dumps(features))

# %% mystnb={"image": {"alt": "One horizontal bar, stacked from the seconds of five stages: read, network, decode, measure and write. The network has the longest part."}, "figure": {"caption": "The stages of one image of 1,024 px on the machine that built this page, one after the other, on the CPU.", "name": "fig-archive-stages"}}
archive.plot_stages(seconds)
plt.show()

# %% [markdown]
# On a CPU the network takes the longest. A faster engine, a lower precision or a GPU shortens this stage only; the
# others stay as they are and so limit what can be gained. Even if the network took no time at all, the image would
# still need the rest. `nucseg predict` therefore runs stages at the same time: a thread reads the next fields while
# the network works on the current ones, and nuclei are decoded in the rows of fields that are complete.

# %% tags=["hide-input"]
folder.cleanup()
check("1,024", image.shape[0])
assert list(seconds) == ["read", "network", "decode", "measure", "write"]
assert max(seconds, key=seconds.get) == "network", "the network takes the longest"
assert len(table) == labels.max() == len(features) > 100

# %% [markdown]
# ## Memory against size
#
# An image that is segmented in memory, as `nucseg.segment` does, needs arrays of its full size: the image, the two
# target maps (one byte per value, in steps of 1/255), and the {term}`label map`. Their types give the bytes per
# pixel:

# %%
arrays = {
    "image": 3 * np.uint8().nbytes,
    "maps": 2 * np.uint8().nbytes,
    "labels": np.int32().nbytes,
}
bytes_per_pixel = sum(arrays.values())


def gibibytes(side_px):
    return bytes_per_pixel * side_px**2 / 2**30


print("bytes per pixel:", arrays)
print(f"20,000 px: {gibibytes(20_000):.2f} GiB")
print(f"100,000 px: {gibibytes(100_000):.1f} GiB")

# %% [markdown]
# At 9 bytes per pixel, an image of 20,000 px needs 3.35 GiB before the network has run, and a slide of 100,000 px
# 83.8 GiB. `nucseg predict` keeps the maps and the labels in files instead, and reads them window by window. Its
# memory depends mostly on the sizes of a field and of a window. From an image of 2,500 px to one of 10,000 px the
# fields grow, from 1,568 px to 2,240 px, and the recorded peak grows with them, from 1.87 to 3.46 GiB. At 20,000 px,
# with four times the pixels, it is 3.68 GiB. So up to this size the network takes more memory than the arrays would;
# larger slides gain. Smaller fields need less: the early version, with 512 px, took 1.35 GiB at 20,000 px.

# %% mystnb={"image": {"alt": "Memory in GiB against the side of the image in pixels, both logarithmic. A straight line for whole images in memory rises to over 80 GiB at 100,000 pixels; four points above the line, up to 20,000 pixels, mark the measured peaks of nucseg predict; the last two are almost equal."}, "figure": {"caption": "Memory against size: the line is arithmetic for arrays held whole, the points were measured.", "name": "fig-archive-memory"}}
peaks = pd.read_csv(results / "large-image" / "sizes.csv", index_col="side_px")[
    "peak_memory_gib"
]
archive.plot_memory(bytes_per_pixel, dict(peaks))
plt.show()

# %% tags=["hide-input"]
check("9", bytes_per_pixel)
check("3.35", gibibytes(20_000))
check("83.8", gibibytes(100_000))
check("20,000", large["side_px"])
check("100,000", 100_000)
check("10,000", peaks.index[-2])
check("1.87", peaks.iloc[0])
check("2,500", peaks.index[0])
check("3.46", peaks[10_000])
check("3.68", peaks[20_000])
check("1.35", large["before"]["peak_memory_gib"])
assert all(peak > gibibytes(side) for side, peak in peaks.items()), "above the line"
check("1,568", spans(int(peaks.index[0]))[0].side)
check("2,240", spans(10_000)[0].side)

# %% [markdown]
# ## The arithmetic of an archive
#
# What an archive needs follows from four numbers: the number of slides, the megapixels of tissue per slide, the
# speed, and the bytes of results per megapixel. The first two are assumptions: 11,000 slides, with 1 cm² of tissue
# each, at 0.25 µm/px. Empty glass is skipped, so only tissue counts. The other two were measured, each on a single
# synthetic image, so take the results as rough estimates.

# %%
slides = 11_000
tissue_megapixels = (10_000 / 0.25) ** 2 / 1e6  # 10 mm = 10,000 µm


def hours(megapixels_per_second, workers=1):
    """Hours for the archive, shared by workers that each reach this speed."""
    return slides * tissue_megapixels / megapixels_per_second / workers / 3600


core_hours = hours(from_file_to_files)
print(f"{tissue_megapixels:,.0f} megapixels a slide, {core_hours:,.0f} core hours")

# %% [markdown]
# At the recorded speed from file to files, the archive takes 8,191 core hours: almost a year of one core, or 8.2 hours
# on 1,000 cores if all are kept busy. The table repeats the calculation for each recorded speed, in hours of the device
# named. Speeds in memory leave out the work on files, so their hours are a lower bound: 1,362 for the H200, nearly all
# of which it waits for its CPU.

# %%
speeds = archive.recorded_speeds(results)
archive.budget(speeds.assign(hours=hours(speeds["megapixels_a_second"])))

# %% [markdown]
# Storage follows in the same way, from the sizes of the files that the recorded run wrote:

# %%
mebibytes = pd.Series(large["files_mib"]).drop(["large.json", "summary.csv"])
mebibytes.index = mebibytes.index.str.removeprefix("large.")
per_megapixel = mebibytes / (large["side_px"] ** 2 / 1e6)
tebibytes = slides * tissue_megapixels * per_megapixel / 2**20
tebibytes.round(2).to_frame("TiB for the archive")

# %% [markdown]
# All five outputs take 9.03 TiB, and the outlines as GeoJSON are 59% of it. The label maps and the tables alone take
# 0.98 TiB, and the other outputs can be made from the label maps later: `nucseg predict` adds missing outputs without
# running the network again. The image on which these sizes were measured is full of nuclei, 83,084 of them, so
# outlines and tables of sparser tissue take less.

# %% tags=["hide-input"]
check("11,000", slides)
check("8,191", core_hours)
check("8.2", hours(from_file_to_files, 1_000))
check("1,000", 1_000)
check("9.03", tebibytes.sum())
check("59%", tebibytes["geojson"] / tebibytes.sum())
check("0.98", tebibytes["labels.tif"] + tebibytes["nuclei.csv"])
check("83,084", large["nuclei"])
assert 0.9 < core_hours / (24 * 365) < 1, "almost a year of one core"
check("1,362", hours(engines.loc[on_gpu, "megapixels_a_second"].max()))

# %% [markdown]
# ## The line that runs it
#
# Images are independent of each other, so jobs can share the work without communicating. On a cluster with Slurm,
# this command is enough:
#
# ```bash
# nucseg predict slides --recursive --out segmented --outputs labels,csv \
#     --on slurm --jobs 500 --slurm cluster.toml
# ```
#
# The file `cluster.toml` says what each job requests from the cluster; here it is as a string, with the options that
# `nucseg` makes of it:

# %%
cluster = """
[slurm]
partition = "cpu"
cpus = 4
memory = "8G"
time = "8:00:00"
setup = ["module load python"]
"""
slurm_options(table=tomllib.loads(cluster)["slurm"])

# %% [markdown]
# [submitit](https://github.com/facebookincubator/submitit) passes these options on to Slurm, as one job array. With
# 500 jobs of 4 cores, the archive takes 4.1 hours if every core is busy all the time, which is optimistic: in the
# recorded run, two threads used 86% of two cores.
# For GPUs, write `gpus = 1` and ask for as many jobs as you may use cards.
#
# Each job begins with its own share of the images, every 500th, and then helps with what the others have not finished:

# %%
names = [f"slide_{number:05d}.svs" for number in range(slides)]
jobs = 500
shares = [names[k::jobs] for k in range(jobs)]

# %% [markdown]
# Each share has 22 slides. The jobs coordinate through files in the output folder, and nothing is lost if one of them
# stops:
#
# - **One image, one process.** A process locks the image that it works on, and the others skip it.
# - **Finished work is skipped**, so the same command continues after a failure, or adds new slides.
# - **A killed job resumes.** If Slurm preempts a job or its time is over, it is queued again. Its image continues after
#   the last complete row of fields.
# - **The command may be stopped.** It shows a table of what is running, waiting, finished and failed. The jobs do not
#   need it; run it again to watch.
# - **Failures are listed.** A slide that cannot be read does not stop the others. It is listed at the end with its
#   log.
#
# On one machine, `--on local --jobs 4` does the same with processes. `nucseg search`, `cross-validate` and
# `reproduce` take the same options for training runs, and give the same scores as a single process.

# %% tags=["hide-input"]
check("4.1", hours(from_file_to_files, 500 * 4))
check("86%", large["cpu_seconds"] / large["seconds"] / 2)
check("22", len(shares[0]))
assert {len(share) for share in shares} == {22}
assert sorted(name for share in shares for name in share) == names, (
    "every slide once"
)

# %% [markdown]
# ## Summary
#
# - Compare speeds in megapixels per CPU second. From file to files it was 0.60; in memory, with an adapter that sees
#   fewer pixels, more.
# - On a CPU the network takes the longest, and overlap between fields makes it see each pixel more than once.
# - Memory need not grow with the image: with maps and labels in files, an image of 20,000 px took 0.22 GiB more than
#   one of 10,000 px. The fields take most of it.
# - Hours and storage of an archive follow from two measured numbers and two assumptions; state both.
# - One command divides the work, skips what is finished, resumes what was interrupted, and names what failed.

# %% tags=["hide-input"]
check("0.60", from_file_to_files)
check("0.22", peaks[20_000] - peaks[10_000])
check("20,000", peaks.index[-1])
check("10,000", peaks.index[-2])

# %% [markdown]
# ## Exercises

# %% [markdown]
# ```{exercise} A bound
# :label: ex-archive-bound
# Someone measures the time per pixel of the network alone on a new GPU, and multiplies it by the pixels of an
# archive. Why is the result too small?
# ```

# %% [markdown]
# ```{solution} ex-archive-bound
# :class: dropdown
# Fields overlap, so the network sees each pixel more than once. Reading, decoding, measuring and writing take time
# too; the faster the GPU, the larger their share.
# ```

# %% [markdown]
# ```{exercise} Which files to keep
# :label: ex-archive-files
# You want the density of nuclei of each slide, and may later look at some slides in QuPath. Which outputs do you ask
# for?
# ```

# %% [markdown]
# ```{solution} ex-archive-files
# :class: dropdown
# `--outputs labels,csv`. The table lists the nuclei, and `summary.csv`, which is always written, has their number per
# mm² of each image (glass included). For the few slides that you open later, run the command again with
# `--outputs geojson`: the outlines are made from the label maps, without the network.
# ```

# %% [markdown]
# ```{exercise} A day and eight GPUs
# :label: ex-archive-gpus
# How fast must one GPU be, in megapixels per second, so that eight of them finish the archive of this chapter in a day?
# ```

# %% [markdown]
# ```{solution-start} ex-archive-gpus
# :class: dropdown
# ```

# %%
needed = slides * tissue_megapixels / (8 * 24 * 3600)
print(f"{needed:.1f} megapixels per second and GPU")
assert abs(hours(needed, workers=8) - 24) < 1e-9

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} The price of glass
# :label: ex-archive-glass
# A scanned slide has 4,800 megapixels, a third of which is tissue. How many core hours does skipping the glass save
# over the whole archive, assuming that glass would take as long as tissue?
# ```

# %% [markdown]
# ```{solution-start} ex-archive-glass
# :class: dropdown
# ```

# %%
whole = slides * 4800 / from_file_to_files / 3600
saved = whole - core_hours
print(f"{saved:,.0f} core hours, {saved / whole:.0%} of all")
assert abs(saved / whole - 2 / 3) < 1e-9  # 1600 of 4800 megapixels are tissue

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} Fields and margins
# :label: ex-archive-margins
# A small computer has memory for fields of 1,120 px, with a margin of 112 px on each side. How often does its network
# see a pixel of an image with a side of 20,000 px, how often with half the margin, and what might that cost?
# ```

# %% [markdown]
# ```{solution-start} ex-archive-margins
# :class: dropdown
# ```

# %%
usual = times_seen(20_000, sides=[1120])
halved = times_seen(20_000, sides=[1120], margin=56)
print(f"usual margin: {usual:.2f}, half of it: {halved:.2f}")
# cheaper, but pixels near a core's border see less of their surroundings
assert halved < usual < small_fields

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} Too many jobs
# :label: ex-archive-jobs
# Each job spends 20 seconds on loading PyTorch and the network before it starts. With how many jobs of one core does
# this start take more than a hundredth of each job's time?
# ```

# %% [markdown]
# ```{solution-start} ex-archive-jobs
# :class: dropdown
# ```

# %%
start_hours = 20 / 3600
limit = 0.01 / 0.99 * core_hours / start_hours  # start / (start + work) = 0.01
print(f"{limit:,.0f} jobs, {slides:,} slides")
assert limit > slides
assert abs(start_hours / (start_hours + core_hours / limit) - 0.01) < 1e-9

# %% [markdown]
# ```{solution-end}
# ```

# %% tags=["hide-input"]
check("4,800", 3 * tissue_megapixels)
check("1,120", SIDES[0])
check("112", MARGIN)
check("20,000", large["side_px"])

# %% [markdown]
# ## Further reading
#
# - {cite:t}`zhang2023mobilesam` explain why MobileSAM's encoder is small enough for a CPU.
# - [The model in other programs](../export.md) writes the network for other programs and engines; [The command line](../cli.md) lists all options of the commands.
# - The [documentation of Slurm](https://slurm.schedmd.com/job_array.html) explains job arrays.
