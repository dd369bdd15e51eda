# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # LoRA: fine-tuning with few weights

# %% tags=["hide-input"]
import copy
import inspect
import itertools
import textwrap
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from torch import nn

from nucseg.config import ModelConfig
from nucseg.data.synth import TISSUES, generate
from nucseg.model import lora
from nucseg.model.bases import load_base
from nucseg.model.network import build_model, parameter_ledger
from nucseg.model.sam import build_sam
from nucseg.records.provenance import provenance_note
from nucseg.viz import figures

started = time.monotonic()
torch.manual_seed(0)
torch.set_grad_enabled(
    False
)  # this page trains nothing; the one gradient it needs is asked for
figures.use_style()

base = load_base("random", seed=0)
report = ModelConfig(
    base="random", size=128, rank=4, alpha=4, dropout=0.0, unused_head=True
)
model = build_model(report, base)
Markdown(provenance_note(model=model))

# %% [markdown]
# ## Overview
#
# A pretrained network has seen far more images than we will ever label. Fine-tuning adapts it to our task,
# but adapting every weight means storing, and overfitting, every weight. Low-rank adaptation, LoRA
# {cite}`hu2021lora`, leaves the weights as they are and learns a small correction beside some of them.
#
# This page reads the implementation that the rest of the book uses, and checks on MobileSAM
# {cite}`zhang2023mobilesam` what the report says about it:
#
# 1. what LoRA adds to a layer, and what it costs;
# 2. which layers of MobileSAM it can be added to, and how many weights each choice trains;
# 3. three properties that must hold: before training the model is unchanged, frozen means frozen, and the
#    correction can be folded into the weights afterwards.
#
# ## What you need
#
# You should know what a linear layer is and have written a training loop in PyTorch once. Nothing is
# downloaded: everything here is a property of the architecture, so random weights serve as well as the
# trained ones. The last line of the page says how long it took to run.

# %% [markdown]
# ## The idea
#
# A linear layer multiplies its input by a weight matrix $W_0$. Full fine-tuning replaces it by
# $W_0 + \Delta W$, where $\Delta W$ is as large as $W_0$ itself. LoRA supposes that a useful $\Delta W$ is
# simple, in the sense that it has a low rank $r$, and writes it as a product of two thin matrices:
#
# $$
# h = W_0 x + b + \frac{\alpha}{r} \, B A x
# $$ (eq-lora)
#
# with $A \in \mathbb{R}^{r \times d_{in}}$ and $B \in \mathbb{R}^{d_{out} \times r}$. Only $A$ and $B$ are trained. $A$ squeezes the input into $r$ numbers, $B$ spreads them out again. The
# factor $\alpha / r$, called the scaling, is fixed: it lets one change the rank without having to search for
# a new learning rate.

# %% tags=["remove-input"]
qkv = lora.lora_layers(model.encoder)["layers.3.blocks.0.attn.qkv"]
d_out, d_in = qkv.linear.weight.shape
Markdown(
    f"The widest attention layer of MobileSAM's encoder maps {d_in} numbers to {d_out}. Its weight has "
    f"{d_in} × {d_out} = {d_in * d_out:,} entries. At rank {qkv.r}, $A$ and $B$ have "
    f"{qkv.r} × ({d_in} + {d_out}) = {qkv.r * (d_in + d_out):,} together: "
    f"{qkv.r * (d_in + d_out) / (d_in * d_out):.1%} of it. The figure shows the three matrices to scale."
)

# %% mystnb={"figure": {"caption": "The frozen weight of one attention layer and the two matrices that LoRA trains beside it, to scale.", "name": "fig-lora-to-scale"}, "image": {"alt": "A large grey rectangle for the frozen weight, 320 wide and 960 high, then a sliver as high as the rectangle for B and a sliver as wide as it for A."}} tags=["hide-input"]
figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.6))
gap = 130
ax.add_patch(plt.Rectangle((0, 0), d_in, d_out, color="#c8c8c8"))
ax.add_patch(plt.Rectangle((d_in + gap, 0), qkv.r, d_out, color=figures.SERIES[1]))
ax.add_patch(
    plt.Rectangle((d_in + 2 * gap, d_out / 2), d_in, qkv.r, color=figures.SERIES[0])
)
ax.text(
    d_in / 2,
    d_out / 2,
    f"$W_0$, frozen\n{d_out} × {d_in}",
    ha="center",
    va="center",
)
ax.text(d_in + gap / 2, d_out / 2, "+", ha="center", va="center", fontsize=16)
ax.text(
    d_in + gap + 20,
    0,
    f"$B$\n{d_out} × {qkv.r}",
    va="top",
    color=figures.SERIES[1],
)
ax.text(
    d_in * 1.5 + 2 * gap,
    d_out / 2 + 30,
    f"$A$\n{qkv.r} × {d_in}",
    ha="center",
    va="top",
    color=figures.SERIES[0],
)
ax.set(xlim=(-10, 2 * d_in + 2 * gap + 10), ylim=(d_out + 10, -10), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# ## The layer in code
#
# `LoRALinear` wraps an existing linear layer. A small one shows what it holds:

# %%
small = lora.LoRALinear(nn.Linear(6, 4), r=2, alpha=4)
pd.DataFrame(
    [
        (name, tuple(p.shape), "trained" if p.requires_grad else "frozen")
        for name, p in small.named_parameters()
    ],
    columns=["parameter", "shape", ""],
).style.hide()


# %% [markdown]
# The forward pass is equation {eq}`eq-lora`, read from left to right. `F.linear(x, A)` computes $A x$ for a
# batch of $x$, so the large product $B A$ is never formed:


# %% tags=["hide-input"]
def show(function):
    """The source of a function, just as the package has it."""
    return Markdown(f"```python\n{textwrap.dedent(inspect.getsource(function))}```")


show(lora.LoRALinear.forward)

# %% [markdown]
# The matrices start as different things. $A$ is random, $B$ is zero. Their product is zero, so the first
# forward pass gives what the frozen layer gives. If both were zero, neither would ever receive a gradient.
#
# `inject` walks over a model and wraps the layers whose name fits a *placement*. These are the placements,
# as patterns for the names of layers:

# %%
pd.DataFrame(
    lora.TARGETS.items(), columns=["placement", "name of the layer"]
).style.hide()

# %% [markdown]
# ## Where the weights sit
#
# MobileSAM has three parts. The image encoder is a TinyViT {cite}`wu2022tinyvit`: one stage of convolutions,
# then three stages of window attention. The prompt encoder and the mask decoder are those of SAM
# {cite}`kirillov2023sam`.

# %% tags=["hide-input"]
sam = build_sam()
encoder = sam.image_encoder
parts = {
    "patch embedding": [encoder.patch_embed],
    **{
        f"stage {i + 1}, {kind}": [encoder.layers[i]]
        for i, kind in enumerate(["convolutions"] + ["attention"] * 3)
    },
    "neck": [encoder.neck],
    "classifier (never runs)": [encoder.norm_head, encoder.head],
    "prompt encoder": [sam.prompt_encoder],
    "mask decoder": [sam.mask_decoder],
}
weights = {
    part: sum(p.numel() for m in modules for p in m.parameters())
    for part, modules in parts.items()
}
linears = {
    part: [
        layer
        for m in modules
        for layer in m.modules()
        if isinstance(layer, nn.Linear)
    ]
    for part, modules in parts.items()
}
table = pd.DataFrame({"parameters": weights})
table["share"] = table["parameters"] / table["parameters"].sum()
table["Linear layers"] = {part: len(layers) for part, layers in linears.items()}
table["LoRA at rank 4"] = {
    part: sum(4 * (m.in_features + m.out_features) for m in layers)
    for part, layers in linears.items()
}
table.style.format(
    {"share": "{:.1%}", "parameters": "{:,}", "LoRA at rank 4": "{:,}"}
)

# %% tags=["remove-input"]
in_encoder = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
Markdown(
    f"Together these are {table['parameters'].sum():,} parameters, and {len(in_encoder)} linear layers lie in the "
    f"encoder. The last of them belongs to the classifier that TinyViT was first trained with. MobileSAM keeps "
    f"its {table.loc['classifier (never runs)', 'parameters']:,} weights but never calls it."
)

# %% [markdown]
# ## What each placement trains
#
# The report gives two numbers: a total of 10,254,413 parameters, of which 124,321 (1.21%) are trained. It
# places LoRA on the attention layers, at rank 8. A ledger over placements and ranks shows which choice these
# numbers belong to. Each row adds the report's segmentation head, a 1 × 1 convolution.

# %%
# as the report prints them
REPORTED = {"total": 10_254_413, "trainable": 124_321}
placements = {
    "all, classifier too": ("all", True),
    "all": ("all", False),
    "late": ("late", False),
    "mlp": ("mlp", False),
    "attention": ("attention", False),
    "qkv": ("qkv", False),
}


def ledger(lora_target, unused_head, rank):
    config = ModelConfig(
        base="random",
        size=128,
        lora_target=lora_target,
        unused_head=unused_head,
        rank=rank,
        alpha=rank,
    )
    return parameter_ledger(build_model(config, base))


at_4 = pd.DataFrame(
    {name: ledger(*choice, rank=4) for name, choice in placements.items()}
).T
# A and B have r rows or columns, so the count of LoRA weights is proportional to r
trainable = pd.DataFrame(
    {rank: at_4["lora"] * rank // 4 + at_4["head"] for rank in (2, 4, 8, 16)}
)
trainable.rename(columns="rank {}".format).style.format("{:,}").highlight_between(
    left=REPORTED["trainable"],
    right=REPORTED["trainable"],
    props="font-weight: bold; text-decoration: underline",
)

# %% tags=["remove-input"]
name, rank = (trainable == REPORTED["trainable"]).stack().idxmax()
assert (name, rank) == ("all, classifier too", 4) and (
    trainable == REPORTED["trainable"]
).to_numpy().sum() == 1
mine, at_8 = at_4.loc[name], ledger("all", True, rank=8)
assert (
    mine["total"] == REPORTED["total"]
    and at_8["trainable"] == trainable.loc[name, 8]
)
Markdown(
    f"Exactly one cell of the table agrees with the report: LoRA of rank {rank} on *every* linear layer of "
    f"the encoder, the classifier included. There, {mine['lora']:,} LoRA weights and {mine['head']} of the head make "
    f"{mine['trainable']:,}, and {mine['base']:,} + {mine['trainable']:,} = {mine['total']:,}. So the report's count "
    f"is right, and belongs to rank 4, the default of its code. The rank it settled on, 8, trains "
    f"{at_8['trainable']:,} of {at_8['total']:,} weights, {at_8['trainable'] / at_8['total']:.2%} instead of "
    f"{mine['trainable'] / mine['total']:.2%}. LoRA on the attention layers alone would train "
    f"{trainable.loc['attention', 8]:,} at rank 8. None of this makes the method less frugal; it matters to anyone who "
    f"wants to compare with the same number of weights."
)

# %% mystnb={"figure": {"caption": "Trainable weights by placement and rank. The line is the count in the report; the number in each dot is the rank.", "name": "fig-lora-ledger"}, "image": {"alt": "Dot plot. For six placements, trainable weights at ranks 2, 4, 8 and 16 on a logarithmic axis; each doubling of the rank moves the dots by the same step. A vertical line marks the report's count; it passes through rank 4 of the placement on all layers with the classifier."}} tags=["hide-input"]
figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.9))
for row, name in enumerate(trainable.index[::-1]):
    ax.plot(
        trainable.loc[name],
        [row] * len(trainable.columns),
        color="0.8",
        zorder=1,
    )
    ax.scatter(
        trainable.loc[name],
        [row] * len(trainable.columns),
        s=190,
        color=figures.SERIES[0],
        zorder=2,
    )
    for rank in trainable.columns:
        ax.text(
            trainable.loc[name, rank],
            row - 0.02,
            rank,
            ha="center",
            va="center",
            color="white",
            fontsize=8,
        )
ax.axvline(REPORTED["trainable"], color=figures.SERIES[1], zorder=0)
ax.text(
    REPORTED["trainable"] * 1.04,
    len(trainable) - 0.55,
    "the report's count",
    color=figures.SERIES[1],
    fontsize=9,
)
ax.set(
    xscale="log",
    xlabel="trainable weights (logarithmic)",
    yticks=range(len(trainable)),
    ylim=(-0.5, len(trainable) - 0.2),
)
ticks = [20, 50, 100, 200, 500]
ax.set_xticks([1000 * tick for tick in ticks], [f"{tick},000" for tick in ticks])
ax.minorticks_off()
ax.set_yticklabels(trainable.index[::-1])
ax.tick_params(axis="y", length=0)
ax.spines["left"].set_visible(False)
plt.show()

# %% [markdown]
# ### Weights that never learn
#
# The classifier is never called, so its LoRA weights never receive a gradient. One backward pass shows it:

# %%
images = torch.stack(
    [
        torch.from_numpy(generate(tissue, 0, 128).image).permute(2, 0, 1)
        for tissue in TISSUES[::8]
    ]
)
with torch.enable_grad():
    model.train()(images).mean().backward()
idle = [
    name
    for name, layer in lora.lora_layers(model).items()
    if layer.lora_B.grad is None
]
model.zero_grad()
idle

# %% tags=["remove-input"]
unused = sum(
    lora.lora_layers(model)[name].lora_A.numel()
    + lora.lora_layers(model)[name].lora_B.numel()
    for name in idle
)
Markdown(
    f"{unused:,} of the report's {mine['trainable']:,} trainable weights are of this kind. From here on the book "
    "leaves the classifier alone, unless it repeats the report's own configuration."
)

# %% [markdown]
# ## Before training, nothing has changed
#
# Because $B$ starts at zero, the adapted encoder must compute what the base computes. Not approximately: the
# correction that is added is exactly zero.

# %%
plain = build_model(ModelConfig(base="random", size=128, lora_target="none"), base)
pixels = (images.float() - model.mean) / model.std
difference = (
    (model.eval().encoder(pixels) - plain.encoder(pixels)).abs().max().item()
)
difference

# %% tags=["remove-input"]
assert difference == 0
Markdown(
    f"The largest difference over {len(images)} images is {difference:g}. Training therefore starts from MobileSAM "
    "itself, and switching the adapter off gives it back."
)

# %% [markdown]
# ## Frozen means frozen: the BatchNorm trap
#
# Setting `requires_grad = False` freezes weights. It does not freeze everything. A BatchNorm layer also keeps
# a running mean and variance of what passes through it, and in `train()` mode it updates them on every
# forward pass, gradient or not. A "frozen" encoder then changes while one looks at its weights and sees
# nothing change.
#
# `NucleiModel` keeps the BatchNorm layers of a frozen encoder in `eval()` mode, whatever mode the rest is in:

# %% tags=["hide-input"]
show(type(model).train)

# %% [markdown]
# Below, the same model runs forward in training mode ten times, with no optimiser at all. Once it uses the
# method above, once PyTorch's own `train()`, which every module inherits. After each pass we switch to
# `eval()` mode and compare the encoder's output with the base's.

# %%
expected = plain.encoder(pixels)


def drift(model, train, steps=10):
    """Mean change of the output after each step, as a share of its mean size."""
    changes = [0.0]
    for _ in range(steps):
        train(model, True)
        model(images)
        change = (model.eval().encoder(pixels) - expected).abs().mean()
        changes.append(float(change / expected.abs().mean()))
    return changes


ours, careless = copy.deepcopy(model), copy.deepcopy(model)
drifts = {
    "nucseg": drift(ours, type(model).train),
    "PyTorch's train()": drift(careless, nn.Module.train),
}

# %% mystnb={"image": {"alt": "Line plot over ten forward passes. With PyTorch's train() the encoder's output moves away from the base's at once and stays away; with nucseg the change stays at zero."}, "figure": {"caption": "How far the output of a frozen encoder moves while nothing is trained.", "name": "fig-lora-batchnorm"}} tags=["hide-input"]
figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.7))
for (name, changes), colour, line in zip(
    drifts.items(), figures.SERIES, ("-", "--"), strict=False
):
    ax.plot(changes, line, color=colour)
    ax.annotate(
        name,
        (10, changes[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=colour,
    )
ax.set(
    xlabel="forward passes in training mode",
    ylabel="change of output",
    xlim=(0, 14.5),
    xticks=range(0, 11, 2),
)
ax.yaxis.set_major_formatter("{x:.0%}")
plt.show()

# %% tags=["remove-input"]
norms = {
    name: m
    for name, m in plain.encoder.named_modules()
    if isinstance(m, nn.BatchNorm2d)
}
stored = sum(m.running_mean.numel() + m.running_var.numel() for m in norms.values())
moved = [
    name
    for name, m in norms.items()
    if not torch.equal(
        careless.encoder.get_submodule(name).running_mean, m.running_mean
    )
]
last = drifts["PyTorch's train()"][-1]
assert len(moved) == len(norms) and set(drifts["nucseg"]) == {0.0}
Markdown(
    f"With PyTorch's `train()`, {len(moved)} of {len(norms)} layers have moved, {stored:,} stored values in all, and "
    f"the output differs by {last:.0%} of its mean size, although no weight was trained. "
    "How large the effect is depends on the weights and the images. It is never "
    "zero, and an adapter file that holds only LoRA weights would silently lose it. With `nucseg` the difference is "
    f"{drifts['nucseg'][-1]:g}."
)

# %% [markdown]
# ## Merging
#
# After training, $(\alpha / r) B A$ can be added to $W_0$ once and for all. The merged layer is a plain
# linear layer again, with no extra cost. To see that this works we need a $B$ that is not zero; random numbers
# stand in for a trained one.

# %%
for layer in lora.lora_layers(model).values():
    layer.lora_B.normal_(std=0.02)
adapted = model.encoder(pixels)
frozen = qkv.linear.weight.clone()

lora.merge(model)
merged = model.encoder(pixels)
lora.unmerge(model)

same = torch.equal(qkv.linear.weight, frozen)
largest = (adapted - merged).abs().max().item()
effect = (adapted - plain.encoder(pixels)).abs().max().item()
rank = int(torch.linalg.matrix_rank(qkv.delta()))
pd.Series({"effect of the adapter": effect, "merged against adapted": largest}).map(
    "{:.2g}".format
).to_frame("largest difference")

# %% tags=["remove-input"]
assert same and rank == qkv.r and largest <= 1e-3 * effect
Markdown(
    f"The adapter changes the output by up to {effect:.2g}. Merging changes it by at most {largest:.2g}, because the layer "
    f"adds the update to the weight before it multiplies, merged or not. The update of the {d_out} × {d_in} weight has rank {rank}, as it should. After "
    "unmerging, the frozen weight is back bit for bit, because `merge` keeps a copy: subtracting the update again "
    "would leave rounding errors behind."
)

# %% [markdown]
# ## A trap in TinyViT's attention
#
# Attention needs queries, keys and values. Many networks compute all three with one linear layer, `qkv`, and
# it is tempting to adapt only the rows of, say, the queries. In SAM's large encoder these are the first third
# of the rows. In TinyViT they are not: the rows are grouped by attention head, and each head has its own
# queries, keys and values.

# %% tags=["hide-input"]
attention = model.encoder.layers[2].blocks[0].attn
one_head = np.repeat([0, 1, 2], [attention.key_dim, attention.key_dim, attention.d])
actual = np.tile(one_head, attention.num_heads)
assumed = np.repeat([0, 1, 2], len(actual) // 3)
right = (actual == assumed).mean()
lines, first = inspect.getsourcelines(type(attention).forward)
start = next(i for i, line in enumerate(lines) if "self.qkv(x)" in line)
Markdown(f"```python\n{textwrap.dedent(''.join(lines[start : start + 4]))}```")

# %% mystnb={"figure": {"caption": "Which rows of a fused layer are queries (q), keys (k) and values (v): in TinyViT, and as code written for SAM's large encoder assumes.", "name": "fig-lora-qkv"}, "image": {"alt": "Two striped bars of the rows of one qkv layer. In TinyViT, queries, keys and values alternate, once for each of five heads; the assumed order has all queries first, then all keys, then all values."}} tags=["hide-input"]
figure, axes = plt.subplots(2, 1, figsize=(figures.WIDTH, 1.9), sharex=True)
colours = ["#0072b2", "#e69f00", "#b5b5b5"]
for ax, order, title in zip(
    axes, (actual, assumed), ("TinyViT", "assumed"), strict=True
):
    edges = np.flatnonzero(np.diff(order, prepend=-1, append=-1))
    for left, end in itertools.pairwise(edges):
        ax.axvspan(left, end, color=colours[order[left]], linewidth=0)
        ax.text((left + end) / 2, 0.5, "qkv"[order[left]], ha="center", va="center")
    ax.set(title=title, yticks=[], xlim=(0, len(order)))
    ax.spines[:].set_visible(False)
axes[1].set_xlabel("row of the weight")
plt.show()

# %% tags=["remove-input"]
Markdown(
    f"In this layer, with {attention.num_heads} heads, the two orders agree in {right:.0%} of the {len(actual)} rows. "
    "`nucseg` wraps the whole layer, so the order of its rows does not matter."
)

# %% [markdown]
# ## Summary
#
# - LoRA adds $(\alpha / r) B A x$ to a frozen linear layer and trains only the thin matrices $A$ and $B$.
# - The report's count of trainable weights is exact. It belongs to rank 4 on all linear layers of the encoder,
#   an unused classifier among them, not to rank 8 on attention.
# - $B = 0$ at the start makes step 0 the base model. Merging is exact up to rounding, unmerging is exact.
# - Frozen weights are not a frozen network: BatchNorm's running statistics need `eval()` mode too.
# - TinyViT's `qkv` rows are grouped by head. Adapt the whole layer.
#
# ## Further reading
#
# - {cite:t}`hu2021lora` introduce LoRA, and adapt only the attention weights of language models.
# - {cite:t}`kirillov2023sam` and {cite:t}`zhang2023mobilesam` describe SAM and its small encoder.
# - {cite:t}`wu2022tinyvit` describe TinyViT.
# - To try: give `build_model` another `lora_target`, and predict the count before you look at the ledger.

# %% tags=["remove-input"]
Markdown(f"*This page ran in {time.monotonic() - started:.0f} s.*")
