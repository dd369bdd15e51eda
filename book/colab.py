"""Prepare a Colab notebook: clone the repository, install the package, change to the chapters.

Colab opens a notebook by itself, without the package and the recorded results that it reads. The first
cell of each chapter therefore runs this file from the repository, on Colab only. Running it again does
nothing.
"""

import os
import subprocess
import sys

URL = "https://github.com/nucseg/nucseg"
CHAPTERS = os.path.join("nucseg", "book", "chapters")


def prepare() -> None:
    """Clone and install, unless the notebook is in the folder of the chapters already."""
    if os.getcwd().endswith(CHAPTERS):
        return
    if not os.path.isdir("nucseg"):
        clone = ["git", "clone", "--quiet", "--depth=1", URL]
        subprocess.run(clone, check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "./nucseg"]
    subprocess.run(install, check=True)
    os.chdir(CHAPTERS)


if "google.colab" in sys.modules:
    prepare()
