# %% tags=["remove-cell"]
if "google.colab" in __import__("sys").modules: exec(__import__("urllib.request").request.urlopen("https://raw.githubusercontent.com/nucseg/nucseg/main/book/colab.py").read())  # fmt: skip

# %% [markdown]
# # The chapter's title
#
# One short paragraph: the question, and what the chapter finds.
#
# ## Overview
#
# ```{admonition} In this chapter
# :class: objectives
# **You will learn** to do one thing, to explain a second, and to measure a third.
#
# **You need**: [The data: nuclei in stained tissue](data.ipynb). **Time**: 20 minutes to read, 1 minute to run.
# ```

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

from nucseg.data.synth import Synthetic
from nucseg.records.provenance import provenance_note
from nucseg.records.quotes import check
from nucseg.viz import figures

figures.use_style()
dataset = Synthetic(n_per_tissue=1, seed=0)
Markdown(provenance_note(dataset))

# %% [markdown]
# ## One idea a section
#
# A sentence that says what the next cell does. Terms link to the glossary at their first use: a {term}`label map`
# numbers the nuclei of an image.

# %%
counts = [len(np.unique(sample.labels)) - 1 for sample in dataset]

# %% [markdown]
# A sentence that says what came out: the 31 images hold 1,821 nuclei, 58.7 an image. A figure has its caption and its
# alternative text in the line that begins its cell:

# %% mystnb={"image": {"alt": "What the figure shows, for those who cannot see it: two images of synthetic tissue."}, "figure": {"caption": "What to see in the figure.", "name": "fig-template-example"}}
figures.show_row(dataset[0], dataset[1])
plt.show()

# %% tags=["hide-input"]
check("1,821", sum(counts))
check("58.7", np.mean(counts))
assert min(counts) > 0, "an image without nuclei"

# %% [markdown]
# ## Summary
#
# - What to remember.
#
# ## Exercises

# %% [markdown]
# ```{exercise} A quick question
# :label: ex-template-quick
# What does 0 mean in a label map?
# ```

# %% [markdown]
# ```{solution} ex-template-quick
# :class: dropdown
# Background: nuclei are numbered from 1.
# ```

# %% [markdown]
# ```{exercise} A harder one
# :label: ex-template-code
# Which image holds the most nuclei?
# ```

# %% [markdown]
# ```{solution-start} ex-template-code
# :class: dropdown
# ```

# %%
most = int(np.argmax(counts))
assert counts[most] == max(counts)

# %% [markdown]
# ```{solution-end}
# ```

# %% [markdown]
# ## Further reading
#
# - {cite:t}`hu2021lora` introduce LoRA.
