"""Find which histology images of BBBC038 were cut from one microscope field: nucseg/assets/bbbc038_fields.csv.

    python -m experiments.bbbc038_fields --bbbc038 data/bbbc038

Two images are neighbours if their facing edges correlate (0.7 or more), and differ by no more than three times the
difference between rows within an image. Fields are sets of connected images, numbered by their first image. The table
is written only if it differs.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nucseg.files import ASSETS
from nucseg.images.raster import read_image

CORRELATION, STEP = 0.7, 3.0


def fit(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """How the last row of one image (H, W, 3) fits the first row of another: correlation, and the relative step."""
    a, b = first[-1].astype(float), second[0].astype(float)
    within = np.abs(a - first[-2]).mean()
    correlation = np.corrcoef((a - a.mean(0)).ravel(), (b - b.mean(0)).ravel())[0, 1]
    return float(correlation), float(np.abs(a - b).mean() / within)


def fields(images: dict[str, np.ndarray]) -> pd.DataFrame:
    """Images by id, all of one shape (H, W, 3) -> table with columns image and field, sorted by image."""
    names = sorted(images)
    pairs = []
    for i, j in itertools.permutations(range(len(names)), 2):
        below = images[names[i]], images[names[j]]
        for first, second in (below, [image.swapaxes(0, 1) for image in below]):  # below, or to the right
            correlation, step = fit(first, second)
            if correlation > CORRELATION and step < STEP:
                pairs.append((i, j))
    rows, columns = np.array(pairs).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(names),) * 2)
    _, component = connected_components(graph, directed=False)
    return pd.DataFrame({"image": [name[:12] for name in names], "field": pd.factorize(component)[0] + 1})


def main() -> None:
    """Write the table if it has changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bbbc038", type=Path, required=True)
    folder = parser.parse_args().bbbc038 / "images" / "histology"
    table = fields({path.stem: read_image(path) for path in folder.glob("*.png")})
    text, path = table.to_csv(index=False), ASSETS / "bbbc038_fields.csv"
    print(f"{len(table)} images, {table['field'].max()} fields", "as before" if path.read_text() == text else "written")
    if path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    main()
