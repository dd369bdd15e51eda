import json

import pandas as pd
import pytest

from nucseg.records.runs import Run
from nucseg.viz.chapters import report
from nucseg.viz.chapters.report import printed, search_table


def test_a_printed_table_has_the_columns_it_prints_and_a_nameless_index(tmp_path):
    (tmp_path / "report_tables.csv").write_text("table,row,dice,pq\n1,fold 1,0.8,0.4\n2,human liver,0.9,\n")
    table = printed(tmp_path, 2)
    assert list(table.index) == ["human liver"] and list(table.columns) == ["dice"] and table.index.name is None


def test_the_search_table_writes_rates_and_places_as_the_report_does():
    row = {"rank": 8, "alpha": 8, "lr": 3e-4, "dice": 0.79684, "val_dice": 0.82166, "place": 16.0, "val": 0.5964}
    html = search_table(pd.DataFrame([row | {"our place": 14.0, "n": 3}])).to_html()
    cells = [line.split(">")[1].split("<")[0] for line in html.splitlines() if "<td" in line]
    assert cells == ["8", "8", "3e-4", "0.7968", "0.8217", "16", "0.596", "14"]


@pytest.fixture
def folder(tmp_path):
    """Three peers on two images, in another order than ours."""
    rows = [
        {"peer": peer, "tissue": "human liver", "stem": stem, "dice": pq, "aji": pq, "pq": pq}
        for peer, scores in (("unet", (0.2, 0.4)), ("stardist", (0.6, 0.8)), ("cellpose", (0.0, 0.1)))
        for stem, pq in zip("ba", scores, strict=True)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "scores.csv", index=False)
    about = {peer: {"weights": 1_000_000, "cpu_seconds": 600} for peer in ("unet", "stardist", "cellpose")}
    (tmp_path / "run.json").write_text(json.dumps({"peers": about}))
    return tmp_path


def test_peers_are_compared_image_by_image(folder):
    scores = pd.DataFrame({"tissue": "human liver", "stem": ["a", "b"], "dice": 0.5, "aji": 0.5, "pq": [0.5, 0.3]})
    ours = Run({"parameters": {"trainable": 443_082}, "seconds": 1480}, pd.DataFrame(), scores)
    found = report.peer_differences(folder, scores)
    assert {name: round(one.loc["pq", "difference"], 6) for name, one in found.items()} == {
        "U-Net": 0.1,  # a: 0.5 - 0.4, b: 0.3 - 0.2
        "StarDist": -0.3,
        "Cellpose 3": 0.35,
    }
    assert found["U-Net"].loc["pq", ["low", "high"]].tolist() == pytest.approx([0.1, 0.1])
    table = report.peers_table(folder, ours)
    assert table.data["PQ"].tolist() == pytest.approx([0.3, 0.7, 0.05, 0.4])
    text = table.to_html()
    assert all(word in text for word in ("443,082", "+0.100 (+0.100 to +0.100)", "−0.300", ">25<", ">10<"))
