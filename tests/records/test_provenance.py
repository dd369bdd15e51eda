import pytest
from blobs import Blobs

from nucseg.config import ModelConfig
from nucseg.model.network import build_model
from nucseg.records.provenance import plural, provenance_note
from nucseg.records.runs import read_run, results_folder


def test_synthetic_data_is_never_called_real():
    note = provenance_note(Blobs(5))
    assert "synthetic" in note and "no real image" in note and "5 images of 2 tissues" in note


def test_note_names_the_base_with_its_hash_and_the_device():
    model = build_model(ModelConfig(base="random", size=64, lora_target="none"))
    note = provenance_note(model=model)
    assert "random weights" in note and model.base_sha256[:8] in note and "CPU" in note


def test_note_names_what_the_recorded_runs_used():
    runs = [read_run(path) for path in sorted((results_folder(__file__) / "folds" / "offline-small").iterdir())]
    about = runs[0].about
    parts = [
        "5 recorded runs",
        "re-encoded",
        "base of the runs: offline",
        about["device"],
        about["commit"][:7],
        about["date"][:10],
    ]
    note = provenance_note(runs=runs)
    assert [part for part in parts if part not in note] == []


def test_note_is_folded_markdown_with_a_point_for_each_part():
    note = provenance_note(Blobs(5))
    head, body = note.split("\n\n", 1)  # the blank line ends the HTML, so that the list is read as Markdown
    assert head == '<details class="provenance"><summary>Behind this page</summary>'
    points, tail = body.rsplit("\n\n", 1)
    assert tail == "</details>" and points.startswith("- data: ") and "\n" not in points


def test_note_says_when_there_is_nothing_behind_a_page():
    assert "no data" in provenance_note()


@pytest.mark.parametrize(("count", "text"), [(0, "0 tissues"), (1, "1 tissue"), (1000, "1,000 tissues")])
def test_plural(count, text):
    assert plural(count, "tissue") == text
