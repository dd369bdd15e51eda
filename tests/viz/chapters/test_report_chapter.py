import pandas as pd

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
