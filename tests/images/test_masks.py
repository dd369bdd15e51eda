"""Masks in every format: label maps are read, and what seems to be something else is refused by name."""

import io
import json
import pickle

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import io as matlab

from nucseg.errors import InputError
from nucseg.images.coco import _from_text
from nucseg.images.masks import read_labels, read_mask
from nucseg.images.polygons import feature, nuclei_rings, write_geojson


def discs(count=4, side=64, radius=6):
    """(side, side) int32: ``count`` nuclei, far from each other."""
    labels = np.zeros((side, side), np.int32)
    y, x = np.mgrid[:side, :side]
    places = [(16, 16), (16, 46), (46, 16), (46, 46), (31, 31)][:count]
    for number, (cy, cx) in enumerate(places, 1):
        labels[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = number
    return labels


def saved(path, array, **options):
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, **options)
    else:
        Image.fromarray(array).save(path)
    return path


def refused(*words):
    return pytest.raises(InputError, match="".join(f"(?=.*{word})" for word in words) + r"[^\n]*\.$")


TRUE = discs()
BINARY = (255 * (TRUE > 0)).astype(np.uint8)
SOFT = np.asarray(Image.fromarray(BINARY).resize((128, 128), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("mask, seems", [
    (BINARY, "binary"),
    ((TRUE > 0).astype(np.uint8), "binary"),
    (TRUE > 0, "binary"),
    (SOFT, "binary mask with soft edges"),
    (np.where((TRUE == 1) & (np.indices(TRUE.shape)[1] == 16), 254, BINARY), "binary mask with stray values"),
    (255 - BINARY, "inverted"),
    (np.where(TRUE > 0, 4 - TRUE, 9), "inverted"),
    (np.where(discs(5) > 0, discs(5) % 2 + 1, 0), "classes"),
    (np.full_like(BINARY, 255), "no background"),
    (np.where(TRUE > 0, TRUE * 0.2, 0).astype(np.float32), "fractions"),
    (np.random.default_rng(0).integers(0, 255, (64, 64, 3)), "colour picture"),
])  # fmt: skip
def test_what_is_no_label_map_is_refused_with_its_kind(tmp_path, mask, seems):
    array = mask if mask.dtype in (np.float32, bool) else mask.astype(np.uint8)
    with refused(r"x\.", seems):
        read_labels(saved(tmp_path / ("x.tif" if array.dtype == np.float32 else "x.png"), array))


@pytest.mark.parametrize("mask", [BINARY, TRUE > 0, SOFT, np.where(np.roll(BINARY, 1, 0) > BINARY, 254, BINARY)])
def test_components_of_a_binary_mask_on_request(tmp_path, mask):
    path = saved(tmp_path / "x.png", np.asarray(mask, np.uint8) if mask.dtype != bool else mask)
    assert read_labels(path, instances="components").max() == 4
    with refused("components are for binary"):
        read_labels(saved(tmp_path / "y.png", TRUE.astype(np.uint8)), instances="components")
    with refused("inverted"):
        read_labels(saved(tmp_path / "z.png", 255 - BINARY), instances="components")


def test_label_maps_of_every_kind_are_taken(tmp_path):
    """As float32 (ImageJ), as grey saved in colour, as a palette's indices, with any ids, as NumPy and MATLAB files."""
    ids = np.array([0, 7, 300, 12, 40_000])[TRUE].astype(np.uint16)
    expected = np.array([0, 1, 3, 2, 4])[TRUE]
    grey = TRUE.astype(np.uint8)
    palette = Image.fromarray(grey, "P")
    palette.putpalette(bytes(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    saved(tmp_path / "f.tif", TRUE.astype(np.float32), imagej=True)
    saved(tmp_path / "rgb.png", np.dstack([grey] * 3))
    saved(tmp_path / "rgba.png", np.dstack([grey] * 3 + [np.full_like(grey, 255)]))
    saved(tmp_path / "planes.tif", np.stack([grey] * 3), photometric="rgb", planarconfig="separate")
    np.save(tmp_path / "a.npy", TRUE)
    matlab.savemat(tmp_path / "h.mat", {"inst_map": TRUE.astype(float), "type_map": TRUE > 0})
    np.save(tmp_path / "c_seg.npy", {"masks": TRUE.astype(np.uint16), "outlines": TRUE, "filename": "c.png"})
    for name in ("palette.png", "f.tif", "rgb.png", "rgba.png", "planes.tif", "a.npy", "h.mat", "c_seg.npy"):
        np.testing.assert_array_equal(read_labels(tmp_path / name), TRUE, err_msg=name)
    np.testing.assert_array_equal(read_labels(saved(tmp_path / "u.tif", ids)), expected)
    np.testing.assert_array_equal(read_labels(saved(tmp_path / "p.tif", ids, tile=(16, 16))), expected)


def test_a_pyramid_of_labels_and_the_orientation_tag(tmp_path):
    with tifffile.TiffWriter(tmp_path / "p.tif") as writer:
        writer.write(TRUE.astype(np.uint16), tile=(32, 32), subifds=1, photometric="minisblack")
        writer.write(TRUE[::2, ::2].astype(np.uint16), tile=(32, 32), subfiletype=1, photometric="minisblack")
    np.testing.assert_array_equal(read_labels(tmp_path / "p.tif"), TRUE)
    saved(tmp_path / "o.tif", TRUE.astype(np.uint8), extratags=[(274, 3, 1, 6, True)], photometric="minisblack")
    np.testing.assert_array_equal(read_labels(tmp_path / "o.tif"), TRUE)
    white = saved(tmp_path / "w.tif", TRUE.astype(np.uint8), photometric="miniswhite")  # ImageJ's inverted table
    np.testing.assert_array_equal(read_labels(white), TRUE)


def test_palettes_of_colour_pictures_are_refused(tmp_path):
    """Converted from RGB, the indices are in any order, and the background is none in particular."""
    colours = np.array([[242, 9, 37], [80, 221, 108], [70, 211, 66], [104, 164, 140], [210, 241, 64]], np.uint8)
    picture = Image.fromarray(np.array([5, 0, 1, 2, 3], np.uint8)[TRUE], "P")
    picture.putpalette(np.vstack([colours, [[0, 0, 0]]]).astype(np.uint8).tobytes())
    picture.save(tmp_path / "p.png")
    with refused("p.png", "made from a colour picture", "index 5"):
        read_labels(tmp_path / "p.png")


def test_the_only_array_of_a_matlab_file(tmp_path):
    matlab.savemat(tmp_path / "one.mat", {"labels": TRUE})
    np.testing.assert_array_equal(read_labels(tmp_path / "one.mat"), TRUE)
    matlab.savemat(tmp_path / "two.mat", {"labels": TRUE, "types": TRUE})
    with refused("two.mat", "no array inst_map", "labels, types"):
        read_labels(tmp_path / "two.mat")


def test_a_border_value_among_ids_is_refused_and_a_scattered_id_pointed_out(tmp_path):
    y, x = np.mgrid[:128, :128]
    many = np.zeros((128, 128), np.uint8)
    for number, (cy, cx) in enumerate(np.ndindex(5, 5), 1):
        many[(y - 25 * cy - 12) ** 2 + (x - 25 * cx - 12) ** 2 < 49] = number
    edges = many.copy()
    edges[(many > 0) & (np.roll(many, 2, axis=0) == 0)] = 255  # the upper edge of each
    with refused("e.png", "value 255 in 25 separate places"):
        read_labels(saved(tmp_path / "e.png", edges))
    twice = np.where(many == 25, 1, many)
    with pytest.warns(UserWarning, match=r"t\.png': the id 1 lies in 2 separate places"):
        assert read_labels(saved(tmp_path / "t.png", twice)).max() == 24


def test_one_nucleus_and_none_are_label_maps(tmp_path):
    one = np.where(TRUE == 2, 255, 0).astype(np.uint8)
    assert read_labels(saved(tmp_path / "one.png", one)).max() == 1
    assert read_labels(saved(tmp_path / "none.png", np.zeros_like(one))).max() == 0
    two_pieces = np.where(discs(2) > 0, discs(2) + 40, 0).astype(np.uint8)
    two_pieces[13:20, 15:18] = 0  # one of two nuclei is cut in two
    assert read_labels(saved(tmp_path / "cut.png", two_pieces)).max() == 2


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "webp"])
def test_lossy_tiffs_are_refused(tmp_path, compression):
    array = np.dstack([TRUE.astype(np.uint8)] * 3)
    path = saved(tmp_path / "x.tif", array, compression=compression, photometric="rgb", tile=(32, 32))
    with refused("x.tif", "alters labels"):
        read_labels(path)


@pytest.mark.parametrize("name, kind", [("x.jpg", "a JPEG"), ("x.jp2", "JPEG 2000"), ("x.webp", "WebP")])
def test_lossy_pictures_are_refused(tmp_path, name, kind):
    with refused(name, kind, "PNG"):
        read_labels(saved(tmp_path / name, np.dstack([TRUE.astype(np.uint8)] * 3)))


class Explosive:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a mask was run')",)


def test_code_in_a_numpy_file_is_never_run(tmp_path):
    np.save(tmp_path / "x_seg.npy", {"masks": TRUE, "filename": Explosive()})
    np.testing.assert_array_equal(read_labels(tmp_path / "x_seg.npy"), TRUE)
    np.save(tmp_path / "y_seg.npy", {"outlines": TRUE, "filename": Explosive()})
    with refused("y_seg.npy", "no array 'masks'"):
        read_labels(tmp_path / "y_seg.npy")
    (tmp_path / "z.npy").write_bytes(pickle.dumps(Explosive()))
    with refused("z.npy"):
        read_labels(tmp_path / "z.npy")


# ---------------------------------------------------------------- COCO


def coco(segmentations, **more):
    images = [{"id": 3, "file_name": "folder/a.png", "height": 64, "width": 64}, {"id": 4, "file_name": "b.png"}]
    annotations = [{"id": i, "image_id": 3, "category_id": 1, "segmentation": s} for i, s in enumerate(segmentations)]
    annotations += [{"id": 99, "image_id": 4, "category_id": 1, "segmentation": [[0, 0, 5, 0, 5, 5, 0, 5]]}]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}], **more}


def runs_of(mask):
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int)])))
    return np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()


def test_coco_polygons_and_runs(tmp_path):
    square = [10, 20, 30, 20, 30, 40, 10, 40]
    runs = {"size": [64, 64], "counts": runs_of(TRUE == 4)}
    (tmp_path / "all.json").write_text(json.dumps(coco([[square], runs])))
    labels, ignore = read_mask(tmp_path / "all.json", (64, 64), image_name="a.png")
    assert ignore is None and labels.max() == 2
    assert (labels[20:40, 10:30] == 1).all() and (labels == 1).sum() == 400
    np.testing.assert_array_equal(labels == 2, TRUE == 4)
    with refused("all.json", "c.png", "0 times"):
        read_mask(tmp_path / "all.json", (64, 64), image_name="c.png")


def test_coco_text_runs_by_hand(tmp_path):
    """pycocotools encodes the 3 x 3 mask whose middle column is 1 as '333' (runs of 3, 3, 3)."""
    about = coco([{"size": [3, 3], "counts": "333"}])
    (tmp_path / "a.json").write_text(json.dumps(about))
    labels, _ = read_mask(tmp_path / "a.json", (3, 3), image_name="a.png")
    np.testing.assert_array_equal(labels, [[0, 1, 0]] * 3)


def as_text(runs):
    """The encoder of pycocotools (rleToString), to test the decoder against."""
    text = ""
    for i, value in enumerate(runs):
        value -= runs[i - 2] if i > 2 else 0
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | 32 * more) + 48)
    return text


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
def test_text_runs_are_those_of_pycocotools(runs):
    assert _from_text(as_text(runs)) == runs


def test_coco_areas_to_ignore(tmp_path):
    about = coco([[[10, 20, 30, 20, 30, 40, 10, 40]], [[0, 0, 64, 0, 64, 10, 0, 10]]])
    about["annotations"][1]["iscrowd"] = 1
    (tmp_path / "a.json").write_text(json.dumps(about))
    labels, ignore = read_mask(tmp_path / "a.json", (64, 64), image_name="a.png")
    assert ignore[:10].all() and not ignore[10:].any() and labels.max() == 1


# ---------------------------------------------------------------- damage


def bytes_of(name):
    buffer = io.BytesIO()
    if name.endswith(".npy"):
        np.save(buffer, {"masks": TRUE[:9, :9]} if "_seg" in name else TRUE[:9, :9])
    elif name.endswith(".mat"):
        matlab.savemat(buffer, {"inst_map": TRUE[:9, :9]})
    else:
        buffer.write(json.dumps(coco([[[10, 20, 30, 20, 30, 40, 10, 40]]])).encode())
    return buffer.getvalue()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("name", ["a.npy", "a_seg.npy", "a.json"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_arrays_and_coco_files_are_read_or_refused(tmp_path, name, data):
    read_or_refused(tmp_path, name, data)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_matlab_files_are_read_or_refused(tmp_path, data):
    read_or_refused(tmp_path, "a.mat", data)  # each starts a process


def read_or_refused(tmp_path, name, data):
    raw = bytearray(bytes_of(name))
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        labels, _ = read_mask(path, (64, 64), image_name="a.png")
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert labels.dtype == np.int32 and labels.ndim == 2


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["counts", "size", "id", "file_name", "name"]), inner, max_size=4),
    max_leaves=12))  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_any_coco_json_is_read_or_refused(tmp_path, value):
    path = tmp_path / "a.json"
    for about in (coco([value]), coco([], images=value), coco([], annotations=value), coco([], categories=value)):
        path.write_text(json.dumps(about))
        try:
            read_mask(path, (64, 64), image_name="a.png")
        except InputError as error:
            assert "a.json" in str(error)


def test_a_geojson_mask_is_found_by_what_it_holds(tmp_path):
    features = [feature("a", n, p, {}) for n, p in nuclei_rings(TRUE)]
    for name in ("a.geojson", "a.json"):
        write_geojson(tmp_path / name, features)
        np.testing.assert_array_equal(read_mask(tmp_path / name, (64, 64)).labels, TRUE)
