"""The figures and tables of the chapter From one slide to an archive."""

import json
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from nucseg.viz.chapters import archive


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def results(tmp_path):
    rows = [{"seconds_nucseg": 0.2, "seconds_nucseg_own": 0.1}, {"seconds_nucseg": 0.4, "seconds_nucseg_own": 0.2}]
    about = {"device": "CPU, 1 thread", "precision": "float32", "own_precision": "bfloat16", "rows": rows}
    large = {"device": "CPU, 1 thread", "side_px": 10_000, "seconds": 200, "megapixels_a_second": 0.5}
    for name, text in (("throughput", about), ("large-image", large)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(text))
    return tmp_path


def test_speeds_are_those_recorded_and_no_others(results):
    speeds = archive.recorded_speeds(results)
    assert list(speeds["what"]) == ["file to files, 10,000 px", "in memory, 512 px", "in memory, 512 px"]
    assert list(speeds["megapixels_a_second"].round(4)) == [0.5, round(0.262144 / 0.3, 4), round(0.262144 / 0.15, 4)]
    assert list(speeds["precision"]) == ["default precision", "float32", "bfloat16"]
    assert archive.recorded_speeds(results / "none").empty


def test_a_machine_that_measured_its_engines_adds_them(results):
    (results / "engines").mkdir()
    (results / "engines" / "run.json").write_text(json.dumps({"side_px": 1344}))
    row = {"device": "a GPU", "engine": "torch", "precision": "bfloat16", "megapixels_a_second": 25.0}
    pd.DataFrame([row]).to_csv(results / "engines" / "throughput.csv", index=False)
    last = archive.recorded_speeds(results).iloc[-1]
    assert (last["what"], last["device"], last["megapixels_a_second"]) == ("in memory, 1,344 px, torch", "a GPU", 25.0)


def test_bars_have_the_recorded_lengths(results):
    speeds = archive.recorded_speeds(results)
    [ax] = archive.plot_speeds(speeds).axes
    assert [bar.get_width() for bar in ax.patches] == list(speeds["megapixels_a_second"])
    assert ax.get_yticklabels()[0].get_text() == "file to files, 10,000 px\ndefault precision, CPU, 1 thread"


def test_stages_are_stacked_to_the_total():
    figure = archive.plot_stages({"read": 1.0, "network": 6.0, "decode": 3.0})
    [ax] = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 1), (1, 6), (7, 3)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "read (10%)",
        "network (60%)",
        "decode (30%)",
    ]


def test_memory_is_the_area_times_the_bytes():
    [ax] = archive.plot_memory(8.0, {4096: 0.25}).axes
    line, points = ax.get_lines()
    x, y = line.get_data()
    assert y[0] == pytest.approx(8 * x[0] ** 2 / 2**30)
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([4096], [0.25])


def test_the_budget_shows_whole_hours(results):
    speeds = archive.recorded_speeds(results)
    html = archive.budget(speeds.assign(hours=1234.56)).to_html()
    assert "1,235" in html and "file to files" in html
    assert "megapixels/s" in html and "_" not in re.sub(r"<style.*?</style>|id=\S+|class=.*?>", "", html)


def test_each_system_has_its_seconds_and_its_ratio():
    rows = {"report, float32": {"seconds": 2.4, "ratio": 1.0}, "openvino, float32": {"seconds": 0.4, "ratio": 6.0}}
    html = archive.table_end_to_end(rows).to_html()
    found = [re.sub("<.*?>", "", cell).strip() for cell in re.findall(r"<td[^>]*>.*?</td>", html, re.DOTALL)]
    assert found == ["float32", "the report's design", "2.40", "1.0", "float32", "nucseg, OpenVINO", "0.40", "6.0"]
