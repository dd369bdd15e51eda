from nucseg.data.bbbc038 import fields, held_out_histology, parts_of_histology
from nucseg.data.fetch import bbbc038_list


def test_the_fields_are_those_of_the_listed_histology_images():
    listed, table = bbbc038_list(), fields()
    assert table["image"].tolist() == listed["image"][listed["kind"] == "histology"].tolist()
    first = table.drop_duplicates("field")
    assert first["field"].tolist() == list(range(1, 28)), "fields count in the order of their first images"
    assert table["field"].value_counts().max() == 8 and (table["field"].value_counts() == 4).sum() == 23


def test_held_out_images_share_no_field_with_the_others():
    parts, field = parts_of_histology(), fields().set_index("image")["field"]
    count = {part: sum(p == part for p in parts.values()) for part in ("train", "val", "test")}
    assert count == {"train": 44, "val": 13, "test": 50}
    assert set(held_out_histology()) == {image for image, part in parts.items() if part == "test"}
    of = {part: {field[image] for image, p in parts.items() if p == part} for part in count}
    assert not of["train"] & of["val"] and not of["test"] & (of["train"] | of["val"])
    assert len(of["test"]) == 13 and len(of["val"]) == 4
