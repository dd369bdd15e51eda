# %% tags=["remove-cell"]
import os
import subprocess
import sys

if (
    "google.colab" in sys.modules
):  # Colab starts without the package and the recorded runs
    url = "https://github.com/nucseg/nucseg"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", url], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "./nucseg"], check=True
    )
    os.chdir("nucseg/book/chapters")

# %% [markdown]
# # The chapter's title

# %% tags=["hide-input"]
import time

import matplotlib.pyplot as plt
from IPython.display import Markdown

from nucseg.data.synth import Synthetic
from nucseg.records.provenance import provenance_note
from nucseg.viz import figures

started = time.monotonic()
figures.use_style()
dataset = Synthetic(n_per_tissue=1, seed=0)
Markdown(provenance_note(dataset))

# %% [markdown]
# ## Overview
#
# What the chapter is about, and what the reader can do afterwards.
#
# ## What you need
#
# What to know, what to download, how long it runs.

# %% [markdown]
# ## One idea a section
#
# Text before code. A figure has its caption and its alternative text in the line that begins its cell:

# %% mystnb={"image": {"alt": "What the figure shows, for those who cannot see it."}, "figure": {"caption": "What to see in the figure.", "name": "fig-template-example"}} tags=["hide-input"]
figures.show_row(dataset[0], dataset[1])
plt.show()

# %% tags=["remove-input"]
Markdown(
    f"A number in the text is computed where it stands: {len(dataset)} images."
)

# %% [markdown]
# ## Summary
#
# - What to remember.
#
# ## Further reading
#
# - {cite:t}`hu2021lora` introduce LoRA.

# %% tags=["remove-input"]
Markdown(f"*This page ran in {time.monotonic() - started:.0f} s.*")
