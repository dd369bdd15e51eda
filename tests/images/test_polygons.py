"""Masks to outlines and back: by hand, on random masks, and through the files of QuPath and ImageJ."""

import io
import json
import zipfile

import numpy as np
import pytest
import roifile
from geojson_pydantic import FeatureCollection
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.measure import find_contours

from nucseg.errors import InputError
from nucseg.images import polygons
from nucseg.images.polygons import (
    feature,
    filled,
    geojson_annotation,
    nuclei_rings,
    read_geojson,
    read_rois,
    rings,
    roi,
    roi_annotation,
    write_geojson,
)


def label_map():
    """Six nuclei: a disc, two that touch, one at the border, one with a hole, one in two pieces."""
    y, x = np.mgrid[:80, :100]
    labels = np.zeros((80, 100), np.int32)
    labels[(y - 20) ** 2 + (x - 20) ** 2 < 100] = 1
    labels[40:60, 10:20], labels[40:60, 20:30] = 2, 3
    labels[0:9, 50:70] = 4
    labels[(y - 50) ** 2 + (x - 60) ** 2 < 200] = 5
    labels[(y - 50) ** 2 + (x - 60) ** 2 < 30] = 0
    labels[70:76, 80:90], labels[70:76, 92:98] = 6, 6
    return labels


def test_one_pixel_by_hand():
    mask = np.zeros((5, 5), bool)
    mask[1, 2] = True
    [[ring]] = rings(mask, top=10, left=20)
    # the centre of the pixel is at x = 22.5, y = 11.5; the outline runs half a px around it
    assert {tuple(p) for p in ring.tolist()} == {(22.0, 11.5), (23.0, 11.5), (22.5, 11.0), (22.5, 12.0)}
    assert (ring[0] == ring[-1]).all() and polygons._signed_area(ring) == 0.5


def test_a_square_with_a_hole_turns_as_the_specification_says():
    mask = np.ones((9, 9), bool)
    mask[3:6, 3:6] = False
    [[outer, hole]] = rings(mask)
    assert polygons._signed_area(outer) > 0 > polygons._signed_area(hole)
    assert len(outer) == 9  # eight corners of an octagon: points on straight lines are left out


@settings(deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14))))
def test_filling_the_rings_gives_the_mask_back(mask):
    found = rings(mask, 3, 7)
    assert (filled(found, mask.shape, 3, 7) == mask).all()
    assert all((ring[0] == ring[-1]).all() and len(ring) >= 4 for polygon in found for ring in polygon)


@settings(deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 3)))
def test_the_rings_are_find_contours_of_each_nucleus(labels):
    """The same points in the same order, less those on straight lines; touching nuclei do not change one another."""
    for nucleus, found in nuclei_rings(labels, 3, 7):
        traced = [ring for polygon in found for ring in polygon]
        contours = find_contours(np.pad(labels == nucleus, 1).astype(float), 0.5, fully_connected="low")
        assert len(traced) == len(contours)
        for contour in contours:
            points = contour[:-1, ::-1] + (6.5, 2.5)
            bend = np.diff(points, 2, axis=0, prepend=points[-1:], append=points[:1]).any(1)
            assert any(np.array_equal(ring[:-1], points[bend]) for ring in traced)
    assert [n for n, _ in nuclei_rings(labels)] == [n for n in np.unique(labels) if n]


def test_geojson_is_valid_and_round_trips(tmp_path):
    labels = label_map()
    features = [feature("a", n, p, {"area_px": float((labels == n).sum())}) for n, p in nuclei_rings(labels)]
    path = tmp_path / "a.geojson"
    write_geojson(path, features)
    collection = FeatureCollection.model_validate_json(path.read_text())
    assert len(collection.features) == 6 and len({f.id for f in collection.features}) == 6
    assert [f.geometry.type for f in collection.features] == ["Polygon"] * 5 + ["MultiPolygon"]
    assert all(f.properties["objectType"] == "detection" for f in collection.features)
    assert (read_geojson(path, labels.shape) == labels).all()
    write_geojson(path, [])
    assert FeatureCollection.model_validate_json(path.read_text()).features == []
    assert not read_geojson(path, (4, 4)).any()


def zip_of(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def test_rois_round_trip_with_holes_and_parts(tmp_path):
    labels = label_map()
    path = zip_of(tmp_path / "a.zip", [(f"{n:06d}.roi", roi(n, p)) for n, p in nuclei_rings(labels)])
    assert (read_rois(path, labels.shape) == labels).all()
    rois = roifile.roiread(path)
    assert [r.name for r in rois] == [f"{n:06d}" for n in range(1, 7)]
    assert [bool(r.composite) for r in rois] == [False] * 4 + [True] * 2  # the one with a hole, the one in two parts


def test_rois_as_people_draw_them(tmp_path):
    rectangle = (
        roifile.ImagejRoi.new(roifile.ROI_TYPE.RECT, 10, 20, 30, 60) if hasattr(roifile.ImagejRoi, "new") else None
    )
    if rectangle is None:
        rectangle = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, top=10, left=20, bottom=30, right=60)
    oval = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.OVAL, top=40, left=20, bottom=60, right=40)
    triangle = roifile.ImagejRoi.frompoints([[70, 10], [90, 10], [70, 30]])
    path = zip_of(tmp_path / "x.zip", [(f"{i}.roi", r.tobytes()) for i, r in enumerate((rectangle, oval, triangle))])
    labels = read_rois(path, (80, 100))
    assert (labels[10:30, 20:60] == 1).all() and (labels == 1).sum() == 20 * 40
    assert (labels == 2).sum() == pytest.approx(np.pi * 100, rel=0.02) and labels[50, 30] == 2
    assert (labels == 3).sum() == pytest.approx(200, rel=0.1)
    (tmp_path / "one.roi").write_bytes(triangle.tobytes())
    assert (read_rois(tmp_path / "one.roi", (80, 100)) > 0).sum() == (labels == 3).sum()


def test_what_is_no_nucleus_is_refused(tmp_path, monkeypatch):
    line = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.LINE)
    with pytest.raises(InputError, match="line"):
        read_rois(zip_of(tmp_path / "l.zip", [("1.roi", line.tobytes())]), (9, 9))
    monkeypatch.setattr(polygons, "LARGEST_ROI", 1000)
    with pytest.raises(InputError, match="larger entries"):
        read_rois(zip_of(tmp_path / "big.zip", [("1.roi", bytes(1001))]), (9, 9))
    for text in ("", "{}", "[1]", '{"features": [{"geometry": {"type": "Point", "coordinates": [1, 2]}}]}'):
        (tmp_path / "x.geojson").write_text(text)
        with pytest.raises(InputError, match=r"x.geojson"):
            read_geojson(tmp_path / "x.geojson", (9, 9))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_rois_end_in_an_answer_or_an_input_error(tmp_path_factory, data):
    whole = bytearray(roi(1, rings(np.ones((6, 6), bool))))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.roi", bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    raw = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("rois") / "a.zip"
    path.write_bytes(raw)
    try:
        labels = read_rois(path, (20, 20))
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert labels.shape == (20, 20) and labels.max() <= 1


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["features", "geometry", "type", "coordinates", "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_read_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.geojson"
    for wrapped in (value, {"features": [{"geometry": {"type": "Polygon", "coordinates": value}}]}):
        path.write_text(json.dumps(wrapped))
        try:
            labels = read_geojson(path, (8, 8))
        except InputError as error:
            assert "a.geojson" in str(error)
        else:
            assert labels.shape == (8, 8)


def composite(*shapes):
    """A ROI as ImageJ saves joined or hollow selections: a rectangle with a path in it."""
    path = []
    for shape in shapes:
        path += [0, *shape[0]] + [v for point in shape[1:] for v in (1, *point)] + [4]
    one = roifile.ImagejRoi()
    one.roitype = roifile.ROI_TYPE.RECT
    points = np.concatenate([np.array(shape) for shape in shapes])
    (one.left, one.top), (one.right, one.bottom) = points.min(0).tolist(), points.max(0).tolist()
    one.multi_coordinates, one.shape_roi_size = np.array(path, np.float32), len(path)
    return one.tobytes()


def test_joined_and_hollow_rois_are_filled_and_not_their_boxes(tmp_path):
    (tmp_path / "two.roi").write_bytes(composite(square(2, 5)[0][:-1], square(10, 14)[0][:-1]))
    labels = read_rois(tmp_path / "two.roi", (20, 20))
    assert (labels > 0).sum() == 9 + 16 and labels[3, 3] == labels[12, 12] == 1 and labels[7, 7] == 0
    (tmp_path / "ring.roi").write_bytes(composite(square(2, 12)[0][:-1], square(5, 9)[0][:-1]))
    labels = read_rois(tmp_path / "ring.roi", (20, 20))
    assert (labels > 0).sum() == 100 - 16 and labels[6, 6] == 0


def test_archives_without_a_roi_in_the_image_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(InputError, match=r"a\.zip.*holds no ROI"):
        read_rois(tmp_path / "a.zip", (20, 20))
    (tmp_path / "b.roi").write_bytes(composite([(30, 30), (35, 30), (35, 35)]))
    with pytest.raises(InputError, match=r"b\.roi.*20 x 10 px"):
        read_rois(tmp_path / "b.roi", (10, 20))


def test_a_hole_belongs_to_the_part_it_lies_in():
    """A nucleus in two parts, one of them a ring inside the other's bounding box."""
    mask = np.zeros((13, 13), bool)
    mask[3:10, 3:10] = True
    mask[6, 6] = False  # a ring
    mask[1, 1:12] = mask[11, 1:12] = mask[1:12, 1] = True  # a thin C around it
    found = rings(mask)
    assert sorted(len(polygon) for polygon in found) == [1, 2]
    np.testing.assert_array_equal(filled(found, mask.shape), mask)


# ---------------------------------------------------------------- files as other programs write them


def square(low, high):
    return [[[low, low], [high, low], [high, high], [low, high], [low, low]]]


def drawn(coordinates, name="", **more):
    about = {"classification": {"name": name}} if name else {}
    geometry = {"type": "Polygon", "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": about, **more}


def geojson(path, features, head=b""):
    path.write_bytes(head + json.dumps(features).encode())
    return path


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


def test_bare_arrays_single_features_and_byte_order_marks(tmp_path):
    two = [drawn(square(5, 15)), drawn(square(20, 30))]
    for value, head in ((two, b""), (collection(*two), b"\xef\xbb\xbf"), (two, b"\xef\xbb\xbf")):
        labels = read_geojson(geojson(tmp_path / "a.geojson", value, head), (64, 64))
        assert (labels[5:15, 5:15] == 1).all() and (labels[20:30, 20:30] == 2).all() and (labels > 0).sum() == 200
    assert read_geojson(geojson(tmp_path / "b.geojson", two[0]), (64, 64)).max() == 1


def test_a_cell_counts_by_its_nucleus(tmp_path):
    cell = drawn(square(5, 25), nucleusGeometry={"type": "Polygon", "coordinates": square(10, 16)})
    labels = read_geojson(geojson(tmp_path / "a.geojson", collection(cell)), (64, 64))
    assert (labels > 0).sum() == 36 and (labels[10:16, 10:16] == 1).all()


def test_large_outlines_lie_under_small_ones_and_are_pointed_out(tmp_path):
    value = collection(drawn(square(5, 15)), drawn(square(20, 30)), drawn(square(0, 64), "Tumor"))
    with pytest.warns(UserWarning, match=r"feature 3 \(Tumor\) has an area of 4096 px.*Region\*"):
        labels = read_geojson(geojson(tmp_path / "a.geojson", value), (64, 64))
    assert np.bincount(labels.ravel()).tolist() == [0, 100, 100, 64 * 64 - 200]
    value = collection(drawn(square(5, 15)), drawn(square(5, 15)), drawn(square(20, 30)), drawn(square(70, 80)))
    with pytest.warns(UserWarning) as said:
        labels = read_geojson(geojson(tmp_path / "b.geojson", value), (64, 64))
    words = " ".join(str(one.message) for one in said)
    assert "outside the image: feature 4" in words and "covered by others: feature 1" in words
    assert np.bincount(labels.ravel()).tolist() == [64 * 64 - 200, 100, 100]  # numbered on


def test_what_lies_outside_altogether_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.geojson.*64 x 64 px"):
        read_geojson(geojson(tmp_path / "a.geojson", collection(drawn(square(70, 80)))), (64, 64))
    planes = [drawn(square(5, 15)), drawn(square(20, 30))]
    planes[1]["geometry"]["plane"] = {"c": -1, "z": 3, "t": 0}
    with pytest.raises(InputError, match="2 planes"):
        read_geojson(geojson(tmp_path / "p.geojson", collection(*planes)), (64, 64))


@pytest.mark.parametrize("name", ["Ignore*", "ignore", "IGNORE"])
def test_areas_to_ignore_and_regions(tmp_path, name):
    nucleus = drawn(square(5, 15))
    labels, ignore = geojson_annotation(
        geojson(tmp_path / "a.geojson", collection(nucleus, drawn(square(30, 40), name))), (64, 64)
    )
    assert labels.max() == 1 and ignore.sum() == 100 and ignore[30:40, 30:40].all()
    value = collection(drawn(square(0, 50), "Region*"), nucleus, drawn(square(30, 40), name))
    labels, ignore = geojson_annotation(geojson(tmp_path / "b.geojson", value), (64, 64))
    assert labels.max() == 1 and not ignore[:30, :30].any()
    assert ignore[50:].all() and ignore[:, 50:].all() and ignore[30:40, 30:40].all()
    assert ignore.sum() == 64 * 64 - 50 * 50 + 100
    assert geojson_annotation(geojson(tmp_path / "c.geojson", collection(nucleus)), (64, 64)).ignore is None


def place(low, high, name=None, **position):
    one = roifile.ImagejRoi.frompoints(np.array(square(low, high)[0][:-1], np.float32), name=name)
    for field, value in position.items():
        setattr(one, field, value)
    return one.tobytes()


def test_zips_made_on_macos(tmp_path):
    entries = [("0001.roi", place(5, 15)), ("__MACOSX/._0001.roi", bytes(84)), ("._0002.roi", bytes(84))]
    assert (read_rois(zip_of(tmp_path / "a.zip", entries), (64, 64)) > 0).sum() == 100


def test_rois_of_several_slices_are_refused(tmp_path):
    entries = [("1.roi", place(5, 15, position=2)), ("2.roi", place(20, 30, position=3))]
    with pytest.raises(InputError, match=r"a\.zip.*2 slices"):
        read_rois(zip_of(tmp_path / "a.zip", entries), (64, 64))
    entries = [("1.roi", place(5, 15, z_position=1)), ("2.roi", place(20, 30, z_position=2))]
    with pytest.raises(InputError, match="2 slices"):
        read_rois(zip_of(tmp_path / "b.zip", entries), (64, 64))
    entries = [("1.roi", place(5, 15, position=2)), ("2.roi", place(20, 30, position=2)), ("3.roi", place(40, 50))]
    assert read_rois(zip_of(tmp_path / "c.zip", entries), (64, 64)).max() == 3


def test_nested_rois_and_those_that_are_areas(tmp_path):
    entries = [("1.roi", place(10, 20)), ("2.roi", place(5, 40)), ("3.roi", place(50, 60, "ignore-1"))]
    labels, ignore = roi_annotation(zip_of(tmp_path / "a.zip", entries), (64, 64))
    assert np.bincount(labels.ravel()).tolist() == [64 * 64 - 35 * 35, 100, 35 * 35 - 100]
    assert ignore.sum() == 100 and ignore[50:60, 50:60].all()


def test_ids_differ_between_what_they_are_of(tmp_path):
    polygons_ = rings(np.ones((4, 4), bool))
    assert len({feature(name, number, polygons_, {})["id"] for name in "ab" for number in (1, 2)}) == 4
    assert feature("a", 1, polygons_, {})["id"] == feature("a", 1, polygons_, {})["id"]


def test_geojson_as_other_programs_write_it(tmp_path):
    """Geometries without features (shapely), and PowerShell's UTF-16, give the same label map as QuPath's export."""
    rings = [[[x, 2], [x + 4, 2], [x + 4, 8], [x, 8], [x, 2]] for x in (1, 5, 12)]
    shapes = [{"type": "Polygon", "coordinates": [ring]} for ring in rings]
    features = [{"type": "Feature", "properties": {}, "geometry": shape} for shape in shapes]
    collection = json.dumps({"type": "FeatureCollection", "features": features})
    path = tmp_path / "a.geojson"
    path.write_text(collection)
    usual = read_geojson(path, (10, 20))
    assert usual.max() == 3 and (usual > 0).sum() == 3 * 24
    for data in (
        json.dumps({"type": "GeometryCollection", "geometries": shapes}).encode(),
        collection.encode("utf-16"),
        collection.encode("utf-8-sig"),
    ):
        path.write_bytes(data)
        assert np.array_equal(read_geojson(path, (10, 20)), usual)
    for wrong, words in (
        (None, "has no geometry"),
        ({"type": "GeometryCollection", "geometries": []}, "is a Geometry"),
    ):
        features[1]["geometry"] = wrong
        path.write_text(json.dumps(features))
        with pytest.raises(InputError, match=f"feature 2 {words}.*: remove it"):
            read_geojson(path, (10, 20))
