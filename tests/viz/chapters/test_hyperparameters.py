from dataclasses import replace

import pandas as pd
import pytest

from nucseg.records.runs import Run, study_runs
from nucseg.viz.chapters import changes
from nucseg.viz.chapters import hyperparameters as worth

CONFIG = {"lora_target": "all", "rank": 8, "alpha": 8.0, "lora_conv": False, "fold": 1, "seed": 0}


def run(pq: float, trainable: int = 1, **config) -> Run:
    scores = {"fold": "fold 1", "tissue": "t", "stem": ["a", "b"], "dice": 0.5, "aji": 0.5, "pq": [pq, pq]}
    about = {"config": CONFIG | config, "parameters": {"trainable": trainable}}
    return Run(about, pd.DataFrame(), pd.DataFrame(scores))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "LoRA, rank 8"),
        ({"alpha": 16.0}, "LoRA, rank 8, alpha 16"),
        ({"lora_target": "qkv", "lora_conv": True}, "LoRA, rank 8, on qkv, on Conv2d too"),
        ({"lora_target": "none"}, "head only"),
        ({"lora_target": "full"}, "all weights"),
        ({"lora_target": "norms"}, "norms and biases"),
        ({"dora": True}, "DoRA, rank 8"),
        ({"decoder_lora_target": "attention"}, "LoRA, rank 8, attention of the decoder"),
    ],
)
def test_what_is_trained_in_words(config, text):
    assert worth.describe(CONFIG | config) == text


def test_runs_of_another_fold_or_head_are_not_compared():
    runs = {"a": run(0.1), "b": run(0.1, rank=4, alpha=4.0, seed=3), "c": run(0.1, fold=2), "d": run(0.1, dora=True)}
    assert list(worth.comparable(runs, "a")) == ["a", "b", "d"]  # an option that older runs lack does not count
    ablation = study_runs("ablation")["offline-small"]
    assert {"rank-0", "lora-4", "lora-8", "lora-16", "full"} <= set(worth.comparable(ablation, "rank-0"))
    assert not {"random", "linear", "fresh-head", "without-stem"} & set(worth.comparable(ablation, "rank-0"))


def test_new_runs_become_rows_and_seeds_are_paired():
    runs = {
        "lora": run(0.6, 5),
        "lora-seed-1": run(0.4, 5, seed=1),
        "head": run(0.5, 2, lora_target="none"),
        "head-seed-1": run(0.1, 2, lora_target="none", seed=1),
        "qkv": run(0.2, 3, lora_target="qkv"),
    }
    assert list(worth.groups(runs)) == ["head only", "LoRA, rank 8, on qkv", "LoRA, rank 8"]
    found = worth.worth(runs, "head only")
    assert changes.interval(found["LoRA, rank 8"])[0] == pytest.approx(0.2)  # of 0.1 and 0.3, by seed
    assert changes.interval(found["LoRA, rank 8, on qkv"])[0] == pytest.approx(-0.3)
    table = worth.table_worth(runs, "head only", pd.DataFrame({"seconds_a_step": {"head": 0.25}})).data
    assert table["seeds"].tolist() == [2, 1, 2] and table["PQ"].tolist() == ["0.300", "0.200", "0.500"]
    assert table["s per step"].tolist() == ["0.25", "nan", "nan"] and table["PQ against head only"][0] == ""
    assert len(worth.plot_worth(runs, "head only").axes) == 3


def test_gains_by_seed_and_costs():
    runs = {
        "lora": run(0.6, 5),
        "lora-seed-1": run(0.4, 5, seed=1),
        "head": run(0.5, 2, lora_target="none"),
        "head-seed-1": run(0.1, 2, lora_target="none", seed=1),
    }
    found = worth.by_seed(runs, "head only")
    assert found.loc["LoRA, rank 8"].round(6).to_dict() == {0: 0.1, 1: 0.3}
    for name, seconds in zip(runs, (9.0, 7.0, 5.0, 6.0), strict=True):
        runs[name] = replace(runs[name], history=pd.DataFrame({"seconds": [seconds + 1, seconds]}))
    table = worth.costs(runs)
    assert table["seconds"].to_dict() == {"head only": 5.0, "LoRA, rank 8": 7.0}
    assert table["weights"].tolist() == [2, 5] and table["pq"].round(6).tolist() == [0.3, 0.5]
    figure = worth.plot_costs(runs)
    assert [len(ax.lines) for ax in figure.axes] == [2, 2]
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[5.0, 0.6], [5.0, 0.4]]


def test_layers_by_stage():
    names = ["patch_embed.seq.0.c", "layers.1.blocks.0.attn.qkv", "layers.1.blocks.0.mlp.fc1", "neck.0"]
    assert worth.stages(names).to_dict() == {"patch_embed": 1, "layers.1": 2, "rest": 1}


def test_table_4_lies_beside_the_file():
    search = worth.their_search()
    assert sorted(search["place"]) == list(range(1, 37))
    table = worth.table_4(search)
    assert table["printed"].tolist() == [0.7968, 0.7874, 0.7823, 0.7756]
    first = search.query("rank == 8 and alpha == 8 and lr == 3e-4").iloc[0]
    assert table.iloc[0][["val_dice", "place"]].tolist() == [first["val_dice"], first["place"]]
    assert "place of 36" in worth.show_table_4(table).to_html()


@pytest.fixture(scope="module")
def search() -> pd.DataFrame:
    """Two ranks and two alphas at one rate; PQ is rank / 100 + alpha / 10, plus the image's own."""
    rows = [
        {"fold": "fold 1", "tissue": "t", "stem": stem, "dice": 0.0, "aji": 0.0, "pq": own + rank / 100 + alpha / 10,
         "rank": rank, "alpha": alpha, "lr": 1e-3, "val_dice": alpha / 10}
        for stem, own in (("a", 0.0), ("b", 0.5))
        for rank in (2, 4)
        for alpha in (1.0, 2.0)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_one_row_per_configuration(search):
    table = worth.configurations(search).set_index(["rank", "alpha"])
    assert len(table) == 4 and table.loc[(2, 1.0), "pq"] == pytest.approx(0.37)  # the mean of 0.12 and 0.62
    assert table.loc[(2, 2.0), "val_dice"] == 0.2
    assert table["pq_low"].le(table["pq"]).all() and table["pq_high"].ge(table["pq"]).all()
    assert worth.table_search(worth.configurations(search), best=2).data["val_dice"].tolist() == [0.2, 0.2]


def test_one_factor_changes_and_the_others_stay(search):
    by_alpha = worth.factor_changes(search, "alpha", 1.0)
    by_rank = worth.factor_changes(search, "rank", 2)
    assert changes.interval(by_alpha["alpha 2 against 1"]) == pytest.approx((0.1, 0.1, 0.1))
    assert changes.interval(by_rank["rank 4 against 2"]) == pytest.approx((0.02, 0.02, 0.02))


def test_the_recorded_search_is_whole():
    grid = study_runs("report-grid")["offline-small"]
    scores = worth.our_search(grid)
    assert len(worth.configurations(scores)) == 36
    one = grid["rank_2-alpha_2.0-lr_0.001-fold_1"]
    part = scores.query("rank == 2 and alpha == 2 and lr == 1e-3 and fold == 'fold 1'")
    assert part["dice"].tolist() == one.scores["dice"].tolist()
    assert (part["val_dice"] == one.history["val_dice"].max()).all()


def test_shares_and_grids_are_drawn():
    shares = pd.DataFrame({"rank": [0.1], "alpha": [0.3], "lr": [0.5], "rest": [0.1]}, index=["a search"])
    bars = worth.plot_shares(shares).axes[0].patches
    assert [round(bar.get_x(), 9) for bar in bars] == [0, 0.1, 0.4, 0.9]
    search = worth.their_search()
    assert [ax.get_title() for ax in worth.plot_grids({"x": search, "y": search}).axes] == ["x", "y"]
