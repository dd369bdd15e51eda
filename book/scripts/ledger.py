# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # The ledger of claims
#
# Every distinct claim of the report, with its verdict, the evidence and the place where it is checked. This page is for
# looking things up; [The report, side by side](report.ipynb) and [What holds](claims.ipynb) tell the story.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to number claims so that each can be looked up, and to check a page of text against what cells
# compute.
#
# **You need**: [The report, side by side](report.ipynb) for the report's tables. **Time**: a page for reference; 10
# seconds to run.
# ```
#
# There are five verdicts. A claim *holds*, holds *partly*, *does not hold*, or *cannot be checked*. A *note* is not a
# claim: it is something that the text leaves out and a reader needs to know. Where the evidence is *the report's code*,
# the claim was checked by reading its code and its result files, which are not part of this repository (GitHub,
# Zachary-Woo/Assignment-3, commit 43055974). All other evidence is computed in the section that the entry names, from
# the folder `book/reference`, from recorded runs or from the architecture.

# %%
from IPython.display import Markdown

from nucseg.records.provenance import provenance_note
from nucseg.records.runs import results_folder
from nucseg.viz.chapters.ledger import Ledger, quoted

book = results_folder().parent / "book"
ledger = Ledger.read(book / "reference" / "claims.csv")
ledger.table["verdict"].value_counts().rename_axis(None).to_frame("entries")

# %%
Markdown(provenance_note())

# %% [markdown]
# ## How the wording is checked
#
# An entry such as "the folds divide 465 of 665 images" has numbers in it, and numbers go stale. So the chapters that
# compute these numbers also compare them: `ledger.agree(14, {"465": len(used), …})` stops the build if the evidence
# does not contain the text, or if the computed value differs from it. Here are the texts that the chapters compare for
# three entries:

# %%
held = quoted(book / "scripts")
{number: sorted(held[number]) for number in (14, 19, 36)}

# %% [markdown]
# Take these texts out of the evidence, and no digit may be left, except where the entry says that it was read in the
# report's code:

# %%
left = ledger.unexplained(book / "scripts")
assert not left, left
print("texts compared:", sum(map(len, held.values())))

# %% tags=["hide-input"]
table = ledger.table
assert list(table.index) == list(range(1, 44)), (
    "the numbers are quoted elsewhere: keep them"
)
assert set(held) <= set(table.index), (
    "a chapter checks a claim that the ledger does not have"
)
assert (table["cause"] != "").equals(
    table["verdict"].isin(["partly", "does not hold", "note"])
)
assert (table["part"] != "").all()

# %% [markdown]
# (claims-ledger)=
# ## Data, model and training

# %%
ledger.entries("Data and evaluation", "Model", "Training")

# %% [markdown]
# ## Tables 1 to 4

# %%
ledger.entries("Table 1", "Table 2", "Table 3", "Table 4")

# %% [markdown]
# ## Pictures and discussion

# %%
ledger.entries("Pictures", "Discussion")

# %% [markdown]
# ## Summary
#
# - Number the claims before you check them, and give each of them a verdict, including those that hold.
# - Say how each was checked: computed, read in the code, or not at all.
# - Keep the evidence as data, and let the cells that compute a number compare it with the text.
#
# ## Exercises
#
# There are none on this page: those of [The report, side by side](report.ipynb) and [What holds](claims.ipynb) are
# about its entries.
#
# ## Further reading
#
# - {cite:t}`mahbod2024nuinsseg` for the data set and the benchmark that the report and this book use.
