# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # LoRA: fine-tuning with few weights
#
# A pretrained network has seen far more images than we will ever label. Low-rank adaptation, {term}`LoRA`
# {cite}`hu2021lora`, adapts it to a new task without changing its weights: it learns a small correction that is added
# to some of them. This chapter builds LoRA by hand, compares it with the layer that the rest of the book uses, and
# shows where that layer goes in MobileSAM {cite}`zhang2023mobilesam`.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to write a LoRA layer, to count the weights that it trains, to tell which layers of MobileSAM it
# can be added to, to merge it into the weights, and to keep a frozen network frozen.
#
# **You need** to know what a linear layer is and to have written a training loop in PyTorch once. Nothing is
# downloaded: most of the chapter is about the architecture, for which random weights serve as well as trained ones.
#
# **Time**: 30 minutes to read, half a minute to run.
# ```

# %%
import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from torch import nn
from torch.nn import functional as F

from nucseg.config import ModelConfig
from nucseg.data.synth import TISSUES, generate
from nucseg.model import lora
from nucseg.model.bases import load_base
from nucseg.model.network import build_model, parameter_ledger
from nucseg.model.sam import build_sam
from nucseg.records.provenance import provenance_note
from nucseg.records.quotes import check
from nucseg.records.runs import study_runs
from nucseg.records.statistics import difference
from nucseg.viz import figures
from nucseg.viz.chapters.listing import listing
from nucseg.viz.chapters import lora as chapter
from nucseg.viz.explorers import lora_explorer

figures.use_style()
torch.manual_seed(0)
base = load_base("random", seed=0)

# %% [markdown]
# We build the report's model: MobileSAM's {term}`encoder` with LoRA of {term}`rank` 4 on every linear layer, and a
# {term}`head` of one convolution. (The rank sets the size of LoRA's matrices; the next section explains it.)

# %%
report = ModelConfig(
    base="random", size=128, rank=4, alpha=4, dropout=0.0, unused_head=True
)
model = build_model(report, base)
Markdown(provenance_note(model=model))

# %% [markdown]
# ## The idea
#
# A linear layer multiplies its input $x$ by a weight matrix $W_0$. Full fine-tuning replaces it by $W_0 + \Delta W$,
# where the change $\Delta W$ has as many entries as $W_0$ itself. LoRA assumes that a useful $\Delta W$ has a low
# rank $r$, and writes it as a product of two thin matrices:
#
# $$
# h = W_0 \cdot x + b + \frac{\alpha}{r} \cdot B \cdot A \cdot x
# $$ (eq-lora)
#
# with $A \in \mathbb{R}^{r \times d_{in}}$ and $B \in \mathbb{R}^{d_{out} \times r}$. Only $A$ and $B$ are trained.
# $A$ squeezes the input into $r$ numbers, and $B$ spreads them out again. The factor $\alpha / r$, called the
# {term}`scaling`, is fixed. {term}`Alpha <alpha>` is usually set once; the division by $r$ is meant to keep the size
# of the update similar when the rank changes.
#
# The widest attention layer of MobileSAM's encoder turns 320 numbers into 960:

# %%
qkv = lora.lora_layers(model.encoder)["layers.3.blocks.0.attn.qkv"]
d_out, d_in = qkv.linear.weight.shape
full, low = d_in * d_out, qkv.r * (d_in + d_out)
print(f"{d_in} to {d_out}: {full:,} weights, {low:,} of LoRA")

# %% [markdown]
# Its weight has 307,200 entries. At rank 4, $A$ and $B$ together have 5,120, which is 1.7% as many.

# %% mystnb={"figure": {"caption": "The frozen weight of one attention layer and the two matrices that LoRA trains beside it, to scale.", "name": "fig-lora-to-scale"}, "image": {"alt": "A large grey rectangle for the frozen weight, 320 wide and 960 high; beside it, after a plus sign and alpha over r, a sliver as high as the rectangle for B, times a sliver as wide as the rectangle for A."}}
chapter.plot_to_scale(d_in, d_out, qkv.r)
plt.show()

# %% tags=["hide-input"]
check("307,200", full)
check("5,120", low)
check("1.7%", low / full)
assert (d_in, d_out) == (320, 960), "the layer turns 320 numbers into 960"

# %% [markdown]
# ## A LoRA layer in ten lines
#
# The equation is short enough to type. The layer wraps an existing linear layer and freezes it:


# %%
class ByHand(nn.Module):
    """A frozen linear layer plus (alpha / r) B A x."""

    def __init__(self, linear, r, alpha):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / r)
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.linear(x) + self.scaling * (x @ self.A.T) @ self.B.T


# %% [markdown]
# `x @ self.A.T` is $A \cdot x$ for a batch of inputs. Multiplied in this order, from left to right, the large product
# $B \cdot A$ is never formed.
#
# $A$ starts random and $B$ starts at zero. Their product is zero, so before training the wrapped layer gives the same
# output as the frozen one:

# %%
frozen = nn.Linear(32, 32)
x = torch.randn(500, 32)
with torch.no_grad():
    before = frozen(x)
    assert torch.equal(ByHand(frozen, r=2, alpha=2)(x), before)

# %% [markdown]
# ### Is a low rank enough?
#
# That depends on the change that the task needs. Suppose that it is a change of the weight by a matrix of rank 2. We
# let LoRA of ranks 1, 2 and 4 learn it from examples:

# %%
change = torch.randn(32, 2) @ torch.randn(2, 32) / 8  # of rank 2
target = before + x @ change.T


def losses_at(rank, steps=140):
    """The loss of each training step."""
    torch.manual_seed(rank)
    layer = ByHand(frozen, rank, alpha=rank)
    optimiser = torch.optim.Adam([layer.A, layer.B], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(layer(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


losses = {rank: losses_at(rank) for rank in (1, 2, 4)}

# %% mystnb={"figure": {"caption": "LoRA of three ranks learns a change of rank 2.", "name": "fig-lora-learning"}, "image": {"alt": "Line chart of the loss on a logarithmic axis over 140 training steps. The line of rank 1 levels off high; those of ranks 2 and 4 fall by many orders of magnitude."}}
chapter.plot_learning(losses)
plt.show()

# %% [markdown]
# Rank 1 is not enough, rank 2 suffices, and rank 4 learns the same change with twice as many weights as rank 2. For a
# real task nobody knows the rank beforehand. It has to be tried, as the chapter [What LoRA is
# worth](hyperparameters.ipynb) does.

# %% tags=["hide-input"]
start = losses[2][0]
assert losses[1][-1] > 0.1 * start, "rank 1 stops short"
assert max(losses[2][-1], losses[4][-1]) < 1e-4 * start, "ranks 2 and 4 suffice"

# %% [markdown]
# ## The layer of the package
#
# `LoRALinear` does the same with the names of the paper's code. Here it is in full:

# %%
listing(lora.LoRALinear)

# %% [markdown]
# Its base class, `LoRALayer`, refuses a rank or an alpha that makes no sense, creates the two matrices, and
# implements merging, to which we come below. `update` is $B \cdot A \cdot x$, computed as in our ten lines; the base
# class multiplies it by the scaling and adds it to the frozen layer's output. That path is used only with dropout,
# which sets random entries of the update's input to zero during training. Without dropout, `forward` takes a faster
# way to the same result: it first adds $(\alpha / r) \cdot B \cdot A$ to the weight, and then multiplies once.
# For this way the gradients are written by hand, in a `torch.autograd.Function`, because PyTorch's own backward pass
# would also compute a gradient as large as the frozen weight. You may skip the details of this listing; the check
# below it compares the results:

# %%
listing(lora._Adapted)

# %% [markdown]
# Does it compute the same as our layer? We give it our matrices and compare outputs and gradients:

# %%
ours = ByHand(nn.Linear(6, 4), r=2, alpha=4)
theirs = lora.LoRALinear(ours.linear, r=2, alpha=4)
with torch.no_grad():
    ours.B.normal_()
    theirs.lora_A.copy_(ours.A)
    theirs.lora_B.copy_(ours.B)
x = torch.randn(5, 6)
for layer in (ours, theirs):
    layer(x).square().sum().backward()
torch.testing.assert_close(theirs(x), ours(x))
torch.testing.assert_close(theirs.lora_A.grad, ours.A.grad)
torch.testing.assert_close(theirs.lora_B.grad, ours.B.grad)

# %% [markdown]
# They agree. The frozen weight and bias received no gradient. (Both layers wrap the same `nn.Linear`.)

# %%
pd.DataFrame(
    [
        (name, tuple(p.shape), p.requires_grad, p.grad is not None)
        for name, p in theirs.named_parameters()
    ],
    columns=["parameter", "shape", "trained", "has a gradient"],
).style.hide()

# %% [markdown]
# ## Where LoRA sits in MobileSAM
#
# MobileSAM has three parts. The image encoder is a TinyViT {cite}`wu2022tinyvit`: one stage of convolutions, then
# three stages of {term}`window attention`. The prompt encoder and the {term}`mask decoder` are those of SAM
# {cite}`kirillov2023sam`; the report does not use them and puts a head of its own on the encoder instead. Our system
# has another head, the {term}`instance head`, which also sees the finer stages and the image.

# %% mystnb={"figure": {"caption": "The encoder of MobileSAM with LoRA on its linear layers, and the two heads of this book. A model has one of them. Shapes are channels × height × width, for an image of H × W pixels.", "name": "fig-lora-architecture"}, "image": {"alt": "Diagram. From top to bottom: image, patch embedding, stages 1 to 4, neck. Patch embedding, stage 1 and neck are frozen convolutions. Stages 2, 3 and 4 are attention blocks with LoRA in 8, 24 and 8 layers. The instance head takes the image and stages 1, 2 and 4; the report's head takes the neck."}}
chapter.plot_architecture()
plt.show()

# %% [markdown]
# An attention block has four linear layers: `qkv` makes queries, keys and values; `proj` mixes the results of the
# attention heads (parallel copies of the attention, not to be confused with the head of the model); and `fc1` and
# `fc2` form a small network, the MLP, that is applied at each position. We count the weights and linear layers of
# each part:

# %%
sam = build_sam()
encoder = sam.image_encoder
parts = {
    "patch embedding": encoder.patch_embed,
    "stage 1, convolutions": encoder.layers[0],
    "stage 2, attention": encoder.layers[1],
    "stage 3, attention": encoder.layers[2],
    "stage 4, attention": encoder.layers[3],
    "neck": encoder.neck,
    "classifier (never runs)": nn.ModuleList([encoder.norm_head, encoder.head]),
    "prompt encoder": sam.prompt_encoder,
    "mask decoder": sam.mask_decoder,
}
linear = {
    name: [m for m in part.modules() if isinstance(m, nn.Linear)]
    for name, part in parts.items()
}
table = pd.DataFrame(
    {
        "weights": {
            n: sum(p.numel() for p in m.parameters()) for n, m in parts.items()
        },
        "linear layers": {n: len(layers) for n, layers in linear.items()},
        "LoRA of rank 4": {
            n: sum(4 * (m.in_features + m.out_features) for m in layers)
            for n, layers in linear.items()
        },
    }
)
table.style.format("{:,}")

# %% [markdown]
# Together, the parts have 10,130,092 weights. The encoder has 41 linear layers: four in each of its ten attention
# blocks, and the classifier with which TinyViT is trained for image classification. MobileSAM keeps the classifier's
# 321,640 weights but never calls it.

# %% tags=["hide-input"]
check("10,130,092", table["weights"].sum())
check("321,640", table.loc["classifier (never runs)", "weights"])
in_encoder = table.drop(index=["prompt encoder", "mask decoder"])
assert in_encoder["linear layers"].sum() == 41, "41 linear layers in the encoder"
blocks = [b for stage in encoder.layers[1:] for b in stage.blocks]
assert len(blocks) == 10, "ten attention blocks"

# %% [markdown]
# ## What each choice of layers trains
#
# We can choose which layers LoRA wraps; these are its {term}`target modules <LoRA target>`. `inject` goes through the
# model and wraps the layers whose names match a pattern:

# %%
pd.DataFrame(
    lora.TARGETS.items(), columns=["target", "pattern of the layer's name"]
).style.hide()

# %% [markdown]
# The report gives two counts: 10,254,413 parameters in all, of which 124,321 (1.21%) are trained. It describes LoRA
# on the attention layers, at rank 8. We build the model with each choice of layers and count, the report's head
# included.

# %%
REPORTED = {"total": 10_254_413, "trainable": 124_321}
choices = {"all, classifier too": ("all", True)}
choices |= {
    target: (target, False) for target in ("all", "late", "mlp", "attention", "qkv")
}


def ledger(target, unused_head, rank):
    config = ModelConfig(
        base="random",
        size=128,
        lora_target=target,
        unused_head=unused_head,
        rank=rank,
        alpha=rank,
    )
    return parameter_ledger(build_model(config, base))


at_4 = pd.DataFrame(
    {name: ledger(*choice, 4) for name, choice in choices.items()}
).T
# A and B have r rows or columns, so the number of LoRA weights is proportional to r
trainable = pd.DataFrame(
    {r: at_4["lora"] * r // 4 + at_4["head"] for r in (2, 4, 8, 16)}
)
chapter.ledger_table(trainable, REPORTED["trainable"])

# %% mystnb={"figure": {"caption": "Trainable weights by target modules and rank. The line is the count in the report; the number in each dot is the rank.", "name": "fig-lora-ledger"}, "image": {"alt": "Dot plot. For six choices of layers, trainable weights at ranks 2, 4, 8 and 16 on a logarithmic axis; each doubling of the rank moves the dots by the same step. A vertical line marks the report's count; it passes through rank 4 on all layers with the classifier."}}
chapter.plot_ledger(trainable, REPORTED["trainable"])
plt.show()

# %% [markdown]
# Exactly one cell of the table agrees with the report: rank 4 on *every* linear layer of the encoder, the classifier
# included. There, 124,064 LoRA weights and 257 of the head make 124,321, and 10,130,092 + 124,321 = 10,254,413. So
# the report's count is right. It belongs to rank 4, the default of its code. Rank 8, on which the report settled,
# trains 248,385 of 10,378,477 weights: 2.39% instead of 1.21%. LoRA on the attention layers alone would train 89,345
# at rank 8. LoRA is frugal in all these cases; the difference matters only to those who want to compare methods at
# the same number of weights.
#
# The number of trained weights does not tell how good the model becomes. [Beyond the report](beyond.ipynb) compares the
# scores of no LoRA, several ranks and full fine-tuning.

# %% tags=["hide-input"]
matches = (trainable == REPORTED["trainable"]).stack()
assert matches.sum() == 1, "exactly one cell agrees"
assert matches.idxmax() == ("all, classifier too", 4), "rank 4 on every layer"
mine, at_8 = at_4.loc["all, classifier too"], ledger("all", True, rank=8)
assert mine["total"] == REPORTED["total"], "the total agrees too"
assert mine["head"] == 257, "257 of the head"
check("124,064", mine["lora"])
check("10,130,092", mine["base"])
check("248,385", at_8["trainable"])
check("10,378,477", at_8["total"])
check("2.39%", at_8["trainable"] / at_8["total"])
check("1.21%", mine["trainable"] / mine["total"])
check("89,345", trainable.loc["attention", 8])

# %% [markdown]
# ### Rank and alpha of a trained layer
#
# What do rank and alpha do to a trained layer? We take a layer from `nuinsseg-1`, an {term}`adapter` (a file of
# trained LoRA and head weights) that comes with nucseg. The sliders keep only the $r$ strongest directions of its
# update, found by a singular value decomposition, and scale them by $\alpha / r$. The dots are the singular values of
# the update, which measure the strength of its directions. Beside them, the frozen weight, $B$ and $A$ are drawn to
# scale:

# %%
explorer = lora_explorer()
explorer

# %% [markdown]
# At half the alpha, LoRA changes the output half as much. At a lower rank, the weakest directions go first, while the
# others are scaled up, because $\alpha / r$ grows as $r$ falls. In a running notebook, `explorer.live()` does the
# same with finer steps.

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
model.train()(images).mean().backward()
idle = {
    name: layer.lora_A.numel() + layer.lora_B.numel()
    for name, layer in lora.lora_layers(model).items()
    if layer.lora_B.grad is None
}
model.zero_grad()
idle

# %% [markdown]
# 5,280 of the report's 124,321 trainable weights are of this kind. Elsewhere the book leaves the classifier without
# LoRA, unless it repeats the report's own configuration.

# %% tags=["hide-input"]
check("5,280", sum(idle.values()))
assert list(idle) == ["encoder.head"], "only the classifier is idle"

# %% [markdown]
# ## LoRA on convolutions
#
# Stage 1, the downsampling between stages and the neck have no linear layers, so LoRA leaves them untouched. But a
# convolution is a linear map too: at each position it multiplies the patch under its kernel by a matrix. So it can
# have a correction of low rank: a convolution down to $r$ channels, then a 1 × 1 convolution up to the number of
# output channels.

# %%
listing(lora.LoRAConv2d)

# %% [markdown]
# `delta` shows the matrix view: with the patch flattened, the update is $(\alpha / r) \cdot B \cdot A$ again.
# For a 1 × 1 convolution, the patch is one pixel, and LoRA on it is LoRA on a linear layer that runs over all pixels:

# %%
conv = lora.LoRAConv2d(nn.Conv2d(6, 4, kernel_size=1), r=2, alpha=4)
line = lora.LoRALinear(nn.Linear(6, 4), r=2, alpha=4)
with torch.no_grad():
    conv.lora_B.normal_()
    for mine_too, its in zip(line.parameters(), conv.parameters(), strict=True):
        mine_too.copy_(its.view_as(mine_too))
    pixels = torch.randn(1, 6, 8, 8)
    over_pixels = line(pixels.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(conv(pixels), over_pixels)

# %% [markdown]
# For larger kernels, two definitions are in use. Hugging Face's library peft has the one above. The paper's own
# library, loralib, reshapes instead: for a kernel of $k \times k$, $A$ has $r k$ rows and $B$ has $r k$ columns, and
# their product is reshaped to the shape of the weight. The two agree for $k = 1$, which most convolutions of this
# encoder are.
#
# Depthwise convolutions, which apply one small kernel to each channel separately, are left out, because they have no
# matrix between channels whose rank could be reduced. The option `lora_conv` adds LoRA to the other convolutions of
# the encoder:

# %%
with_conv = build_model(
    ModelConfig(base="random", size=128, rank=8, alpha=8, lora_conv=True), base
)
kinds = pd.Series(
    [type(layer).__name__ for layer in lora.lora_layers(with_conv).values()]
)
kinds.value_counts().to_frame("layers")

# %% [markdown]
# With convolutions and the report's head, rank 8 trains 293,849 weights instead of 237,825. Does it help? The study
# `recipe` trained the instance head with and without LoRA on convolutions, on folds 1 and 2, and scored validation
# images:

# %%
runs = study_runs("recipe")["offline-small"]
paired = pd.concat(
    {
        f"fold {fold}": difference(
            runs[f"lora-conv-fold_{fold}"].scores,
            runs[f"reference-fold_{fold}"].scores,
        )
        for fold in (1, 2)
    }
)
names = {"dice": "Dice", "aji": "AJI", "pq": "PQ"}
names |= {"tissue_low": "95% from", "tissue_high": "to"}
shown = paired[["difference", "tissue_low", "tissue_high", "images"]]
shown.rename(index=names, columns=names).style.format("{:+.3f}").format(
    "{:.0f}", subset="images"
)

# %% [markdown]
# On these validation images it does, a little. {term}`PQ <panoptic quality>`, the main score of this book, changes by
# +0.016 (0.007 to 0.026) in fold 1 and by +0.012 (0.003 to 0.021) in fold 2. Each is a mean of
# {term}`paired differences <paired difference>` over 80 validation images, with a 95% interval that resamples whole
# tissues. The intervals do not cover chance in training: there was only one {term}`seed` per fold.

# %% tags=["hide-input"]
check("293,849", parameter_ledger(with_conv)["trainable"])
check("237,825", trainable.loc["all", 8])
check("+0.016", paired.loc[("fold 1", "pq"), "difference"])
check("+0.012", paired.loc[("fold 2", "pq"), "difference"])
for fold, ends in (("fold 1", ("0.007", "0.026")), ("fold 2", ("0.003", "0.021"))):
    low, high = paired.loc[(fold, "pq"), ["tissue_low", "tissue_high"]]
    check(ends[0], low)
    check(ends[1], high)
assert (paired["images"] == 80).all(), "80 validation images in each fold"
assert (paired.xs("pq", level=1)["tissue_low"] > 0).all(), "PQ rises in both folds"

# %% [markdown]
# ## Before training, nothing has changed
#
# Because $B$ starts at zero, the adapted encoder must compute exactly what the frozen {term}`base` computes: the
# correction that is added is zero.

# %%
plain = build_model(ModelConfig(base="random", size=128, lora_target="none"), base)
pixels = (images.float() - model.mean) / model.std
with torch.no_grad():
    expected = plain.encoder(pixels)
    assert torch.equal(model.eval().encoder(pixels), expected)

# %% [markdown]
# The two outputs agree in every bit. Training therefore starts from the base itself, and switching the adapter off
# gives the base back.

# %% [markdown]
# ## Frozen means frozen: the BatchNorm trap
#
# Setting `requires_grad = False` freezes weights. It does not freeze everything. A {term}`BatchNorm` layer also keeps
# a running mean and variance of what passes through it, and in `train()` mode it updates them on every forward pass,
# gradient or not. The output of a "frozen" encoder then changes although none of its weights do.
#
# `NucleiModel` keeps the BatchNorm layers of a frozen encoder in `eval()` mode, whatever mode the rest is in:

# %%
listing(type(model).train)

# %% [markdown]
# Below, two copies of the same model run forward in training mode six times, without an optimiser. One copy uses the
# method above, the other PyTorch's own `train()`, which every module inherits. After each pass we switch to `eval()`
# mode and compare the encoder's output with that of the base.


# %%
@torch.no_grad()
def drift(model, train, passes=6):
    """Mean change of the output after each pass, as a share of its mean size."""
    model, changes = copy.deepcopy(model), [0.0]
    for _ in range(passes):
        train(model, True)
        model(images)
        change = (model.eval().encoder(pixels) - expected).abs().mean()
        changes.append(float(change / expected.abs().mean()))
    return changes


drifts = {
    "nucseg": drift(model, type(model).train),
    "PyTorch’s train()": drift(model, nn.Module.train),
}

# %% mystnb={"image": {"alt": "Line plot over six forward passes. With PyTorch's train() the encoder's output moves away from the base's at once and stays away; with nucseg the change stays at zero."}, "figure": {"caption": "How far the output of a frozen encoder moves while nothing is trained.", "name": "fig-lora-batchnorm"}}
chapter.plot_drift(drifts)
plt.show()

# %% [markdown]
# With PyTorch's `train()` the output moves although no weight was trained. How far it moves depends on the weights
# and the images. A file that holds only the adapter's weights would not contain this change, so the reloaded model
# would differ from the trained one. With `nucseg` the output stays the same in every bit.

# %% tags=["hide-input"]
assert set(drifts["nucseg"]) == {0.0}, "with nucseg the output stays the same"
assert min(drifts["PyTorch’s train()"][1:]) > 0.01, "with train() it moves"

# %% [markdown]
# ## Merging
#
# After training, $(\alpha / r) \cdot B \cdot A$ can be added to $W_0$ once and for all. The merged layer then
# costs no more than a plain linear layer. To test this we need a $B$ that is not zero; random numbers stand in for a
# trained one.

# %%
with torch.no_grad():
    for layer in lora.lora_layers(model).values():
        layer.lora_B.normal_(std=0.02)
    adapted = model.encoder(pixels)
    weight = qkv.linear.weight.clone()

    lora.merge(model)
    merged = model.encoder(pixels)
    lora.unmerge(model)

effect = (adapted - expected).abs().max()
rounding = (adapted - merged).abs().max()
assert rounding < 1e-3 * effect
assert torch.equal(qkv.linear.weight, weight)
assert torch.linalg.matrix_rank(qkv.delta()) == qkv.r

# %% [markdown]
# The assertions check three things. Merging changes the output only by rounding errors, here less than a thousandth
# of the adapter's effect. After unmerging, the frozen weight is restored bit for bit, because `merge` keeps a copy;
# subtracting the update would leave rounding errors behind. And the update of the 960 × 320 weight has rank 4, as it
# should.

# %%
listing(lora.LoRALayer.merge, lora.LoRALayer.unmerge)

# %% [markdown]
# ## A trap in TinyViT's attention
#
# Attention needs queries, keys and values. Many networks compute all three with one linear layer, `qkv`, and it is
# tempting to adapt only the rows of, say, the queries. In SAM's large encoder these are the first third of the rows.
# In TinyViT they are not: its rows are grouped by attention head, and within each group queries, keys and values
# follow one another.

# %%
attention = model.encoder.layers[2].blocks[0].attn
one_head = [0] * attention.key_dim + [1] * attention.key_dim + [2] * attention.d
actual = np.tile(one_head, attention.num_heads)
assumed = np.repeat([0, 1, 2], len(actual) // 3)
agree = np.mean(actual == assumed)

# %% mystnb={"figure": {"caption": "Which rows of a fused layer are queries (q), keys (k) and values (v): in TinyViT, and as code written for SAM's large encoder assumes.", "name": "fig-lora-qkv"}, "image": {"alt": "Two striped bars of the rows of one qkv layer. In TinyViT, queries, keys and values alternate, once for each of five heads; the assumed order has all queries first, then all keys, then all values."}}
chapter.plot_rows({"TinyViT": actual, "assumed": assumed})
plt.show()

# %% [markdown]
# In this layer, with five attention heads, the two orders agree in 33% of the 480 rows, no better than chance.
# `nucseg` wraps the whole layer, so the order of its rows does not matter.

# %% tags=["hide-input"]
check("33%", agree)
assert len(actual) == 480 and attention.num_heads == 5, "480 rows, five heads"

# %% [markdown]
# ## Summary
#
# - LoRA adds $(\alpha / r) \cdot B \cdot A \cdot x$ to a frozen layer and trains only the thin matrices $A$ and $B$.
#   On a convolution it is the same, over patches.
# - The report's count of trainable weights can be reproduced exactly: it is that of rank 4 on all linear layers of
#   the encoder, the unused classifier included.
# - With $B = 0$ at the start, training begins from the base. Merging is exact up to rounding, unmerging is exact.
# - Freezing the weights does not freeze the network: BatchNorm layers must stay in `eval()` mode too.
# - TinyViT's `qkv` rows are grouped by head. Adapt the whole layer.

# %% [markdown]
# ## Exercises
#
# ```{exercise} Why not both zero?
# :label: ex-lora-zero
# $B$ starts at zero so that training starts from the base. Why does $A$ not start at zero as well?
# ```
#
# ```{solution} ex-lora-zero
# :class: dropdown
# The gradient of $B$ has the factor $A \cdot x$, and that of $A$ has the factor $B$. If both matrices are zero, both
# gradients are zero, and training never changes them.
# ```

# %% [markdown]
# ```{exercise} What one layer costs
# :label: ex-lora-cost
# A linear layer turns 128 numbers into 512. How many weights does LoRA of rank 8 train, and what share of the layer's
# own weight is that?
# ```
#
# ```{solution} ex-lora-cost
# :class: dropdown
# $A$ has 8 × 128 entries and $B$ has 512 × 8: 5,120 together, 7.8% of 65,536.
# ```

# %% tags=["hide-input"]
check("5,120", 8 * (128 + 512))
check("65,536", 128 * 512)
check("7.8%", 8 * (128 + 512) / (128 * 512))

# %% [markdown]
# ```{exercise} Predict the ledger
# :label: ex-lora-ledger
# Without building the model, compute how many weights LoRA of rank 8 trains on the MLPs (target `mlp`), with the
# report's head, which has 257 weights. The figure in *Where LoRA sits in MobileSAM* gives the number of attention
# blocks and of channels in each stage. `fc1` maps the channels to four times as many, and `fc2` maps them back. Then
# build the model with `ledger` and compare.
# ```

# %% [markdown]
# ```{solution-start} ex-lora-ledger
# :class: dropdown
# ```

# %%
channels = [128] * 2 + [160] * 6 + [320] * 2  # of the ten attention blocks
per_block = [2 * 8 * (c + 4 * c) for c in channels]  # fc1 and fc2
predicted = sum(per_block) + 257
assert predicted == ledger("mlp", False, rank=8)["trainable"]

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} When LoRA stops saving
# :label: ex-lora-break-even
# From which rank on does LoRA train at least as many weights as the layer has itself? Write a function of $d_{in}$ and
# $d_{out}$, and apply it to the `qkv` layer of 320 × 960.
# ```

# %% [markdown]
# ```{solution-start} ex-lora-break-even
# :class: dropdown
# ```


# %%
def break_even(d_in, d_out):
    """The rank from which on r (d_in + d_out) >= d_in d_out."""
    return int(np.ceil(d_in * d_out / (d_in + d_out)))


assert break_even(320, 960) == 240

# %% [markdown]
# At rank 240 LoRA trains exactly as many weights as the layer has. Above that it trains more, without any gain:
# training the layer itself already allows every change, up to rank 320.
#
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} Switch the adapter off
# :label: ex-lora-off
# Write a context manager in which a model computes what its base computes, without merging or copying. Which attribute
# of the layers do you need to change? Check it on `model`, whose $B$ is no longer zero.
# ```

# %% [markdown]
# ```{solution-start} ex-lora-off
# :class: dropdown
# ```

# %%
from contextlib import contextmanager


@contextmanager
def without_lora(model):
    layers = list(lora.lora_layers(model).values())
    scalings = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = 0.0
        yield model
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling = scaling


with torch.no_grad(), without_lora(model):
    off = model.encoder(pixels)
assert torch.equal(off, expected) and qkv.scaling == 1.0

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ```{exercise} The best update of a given rank
# :label: ex-lora-svd
# Full fine-tuning found some $\Delta W$ of full rank, and you want the LoRA layer that comes closest to it in the sum
# of squared errors. By the theorem of Eckart and Young, the $r$ largest singular values and their vectors give it.
# Write `closest(delta, r)`, which returns $A$ and $B$ for $\alpha = r$, using `torch.linalg.svd`, and check that a
# higher rank comes closer.
# ```

# %% [markdown]
# ```{solution-start} ex-lora-svd
# :class: dropdown
# ```


# %%
def closest(delta, r):
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return s[:r, None] * v[:r], u[:, :r]


torch.manual_seed(0)
delta = torch.randn(48, 16)
misses = []
for r in (1, 4, 16):
    layer = lora.LoRALinear(nn.Linear(16, 48), r=r, alpha=r)
    with torch.no_grad():
        for matrix, value in zip(
            (layer.lora_A, layer.lora_B), closest(delta, r), strict=True
        ):
            matrix.copy_(value)
        misses.append(float((layer.delta() - delta).norm() / delta.norm()))
assert misses[0] > misses[1] > misses[2] and misses[2] < 1e-5

# %% [markdown]
# At rank 16 nothing is missing, because a 48 × 16 matrix has no higher rank. A random matrix is a hard case: its
# singular values are all of similar size.
#
# ```{solution-end}
# ```

# %% [markdown]
# ## Further reading
#
# - {cite:t}`hu2021lora` introduce LoRA, and adapt only the attention weights of language models.
# - {cite:t}`kirillov2023sam` and {cite:t}`zhang2023mobilesam` describe SAM and its small encoder.
# - {cite:t}`wu2022tinyvit` describe TinyViT.
