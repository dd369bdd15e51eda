"""Reading images and masks, the two datasets, and the splits."""

import os
import pickle
import random
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import KFold

from nucseg.data.datasets import ImageFolder, NuInsSeg, Sample, nuinsseg_list, read_image, read_labels
from nucseg.data.splits import Split, all_images, folds, leave_one_tissue_out, report_folds
from nucseg.errors import InputError

RNG = np.random.default_rng(0)


class Names:
    """A dataset of names only: what the splits need."""

    def __init__(self, names):
        self.table = pd.DataFrame(names, columns=["tissue", "stem"], dtype=str)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        raise AssertionError("a split must not read images")


def pinned():
    return list(nuinsseg_list()[["tissue", "stem"]].itertuples(index=False, name=None))


def names_of(count, tissues=1):
    return Names([(f"tissue {i % tissues:02}", f"{i:04}") for i in range(count)])


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".tif", ".tiff"):
        tifffile.imwrite(path, array, **options)
    else:
        Image.fromarray(array).save(path, **options)
    return path


def rgb(height=8, width=12):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def label_map(height=8, width=12, ids=(3, 7)):
    labels = np.zeros((height, width), np.uint16)
    for column, value in enumerate(ids):
        labels[2:5, 4 * column + 1 : 4 * column + 3] = value
    return labels


def refused(*words):
    """The error is one sentence (it ends in one full stop and has no line break) with those words."""
    pattern = "(?s)^(?!.*\n)" + "".join(f"(?=.*{word})" for word in words) + r".*[^.]\.$"
    return pytest.raises(InputError, match=pattern)


# ---- read_image --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.bmp", "x.TIFF"])
def test_rgb_is_read_as_it_is(tmp_path, name):
    image = rgb()
    save(tmp_path / name, image)
    read = read_image(tmp_path / name)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, image)


@pytest.mark.parametrize("compression", ["lzw", "zstd", "zlib"])
def test_compressed_tiff_image(tmp_path, compression):
    image = rgb()
    np.testing.assert_array_equal(read_image(save(tmp_path / "x.tif", image, compression=compression)), image)


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    """As that of human_liver_31.png."""
    rgba = np.dstack([rgb(), np.full((8, 12), 255, np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "x.png", rgba)), rgba[..., :3])


def test_grey_and_palette(tmp_path, recwarn):
    grey = rgb()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_image(save(tmp_path / "grey.png", grey)), expected)
    colours = np.array([[10, 20, 30], [200, 100, 0], [1, 2, 3]], np.uint8)
    index = RNG.integers(0, 3, (8, 12), dtype=np.uint8)
    palette = Image.fromarray(index, "P")
    palette.putpalette(colours.tobytes())
    palette.save(tmp_path / "p.png", transparency=b"\x00\x80\xff")
    alpha = np.array([0, 128, 255])[index][..., None] / 255  # blended over white
    np.testing.assert_allclose(read_image(tmp_path / "p.png"), colours[index] * alpha + 255 * (1 - alpha), atol=1)
    assert not [w for w in recwarn if "ransparency" in str(w.message)]


def png16(path, channels):
    """A 16 bit PNG made by hand: Pillow writes none in colour."""

    def chunk(kind, body):
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    rows = b"".join(b"\0" + bytes(range(4 * channels * 2)) for _ in range(4))
    header = (4).to_bytes(4) + (4).to_bytes(4) + bytes([16, {1: 0, 3: 2}[channels], 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_png_image_is_refused(tmp_path, channels):
    with refused("x.png", "8 bit"):
        read_image(png16(tmp_path / "x.png", channels))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "float64"])
def test_deep_tiff_image_is_refused(tmp_path, dtype):
    with refused("x.tif", "8 bit"):
        read_image(save(tmp_path / "x.tif", rgb().astype(dtype), photometric="rgb"))


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    with refused("nothing.png", "check the path"):
        read_image(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no image")
    with refused("text.png", "cannot be read"):
        read_image(tmp_path / "text.png")
    (tmp_path / "text.tif").write_bytes(b"II*\0 no image")
    with refused("text.tif"):
        read_labels(tmp_path / "text.tif")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.bmp", "lzw.tif"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_image_is_refused(tmp_path, name, keep):
    options = {"compression": "lzw"} if name == "lzw.tif" else {}
    path = save(tmp_path / name, rgb(64, 64), **options)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with refused(name):
        read_image(path)


@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}, {"compression": "zlib", "rowsperstrip": 8}])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_truncated_mask_is_refused_not_read_as_background(tmp_path, options, keep):
    labels = RNG.integers(0, 500, (64, 64)).astype(np.uint16)
    path = save(tmp_path / "x.tif", labels, **options)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with refused("x.tif"):
        read_labels(path)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with refused("big.png", "tiles"):
        read_image(save(tmp_path / "big.png", rgb()))
    with refused("big.tif", "tiles"):
        read_labels(save(tmp_path / "big.tif", label_map()))


def test_several_pages_are_refused(tmp_path):
    stack = np.zeros((3, 64, 64), np.uint8)
    for read in (read_image, read_labels):
        with refused("x.tif", "3 pages"):
            read(save(tmp_path / "x.tif", stack, photometric="minisblack"))
    frames = [Image.fromarray(rgb()) for _ in range(2)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:])
    with refused("x.webp", "2 pages"):
        read_image(tmp_path / "x.webp")


# ---- read_labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint32", "int64"])
def test_labels_are_renumbered_in_order(tmp_path, dtype):
    labels = label_map(ids=(7, 3, 120)).astype(dtype)
    read = read_labels(save(tmp_path / "x.tif", labels))
    assert read.dtype == np.int32 and read.shape == labels.shape
    for value, new in ((0, 0), (3, 1), (7, 2), (120, 3)):
        assert np.array_equal(read == new, labels == value)


def test_large_ids_and_masks_without_background(tmp_path):
    labels = np.array([[4_000_000_000, 5], [0, 9]], np.uint32)
    np.testing.assert_array_equal(read_labels(save(tmp_path / "x.tif", labels)), [[3, 1], [0, 2]])
    with pytest.raises(InputError, match="no background"):  # as ilastik writes classes: 1 and 2
        read_labels(save(tmp_path / "y.tif", np.maximum(labels, 1)))
    with pytest.raises(InputError, match="no background"):
        read_labels(save(tmp_path / "z.tif", np.full((2, 2), 7, np.uint16)))


def test_sixteen_bit_png_mask(tmp_path):
    read = read_labels(save(tmp_path / "x.png", label_map(ids=(300, 40_000))))
    np.testing.assert_array_equal(read, label_map(ids=(1, 2)))


def test_empty_mask_is_allowed(tmp_path):
    assert not read_labels(save(tmp_path / "x.png", np.zeros((5, 5), np.uint8))).any()


def test_palette_mask_gives_indices(tmp_path):
    index = label_map().astype(np.uint8)
    palette = Image.fromarray(index, "P")
    palette.putpalette(bytes(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "x.png") > 0, index > 0)


@pytest.mark.parametrize("value", [1, 255])
def test_binary_mask_becomes_components_on_request(tmp_path, value):
    mask = np.zeros((8, 12), np.uint8)
    mask[1, 1] = mask[2, 2] = value  # they touch at a corner: one nucleus
    mask[5:7, 6:9] = value
    path = save(tmp_path / "x.png", mask)
    with refused("x.png", "binary", "--instances components"):
        read_labels(path)
    read = read_labels(path, instances="components")
    assert read.dtype == np.int32 and read.max() == 2
    assert read[1, 1] == read[2, 2] != read[5, 6] > 0
    assert read_labels(path, trusted=True).max() == 1
    Image.fromarray(mask > 0).save(tmp_path / "bool.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "bool.png", instances="components"), read)


@pytest.mark.filterwarnings("ignore:.*separate places")
def test_two_ids_are_never_split(tmp_path):
    mask = label_map()
    mask[7, 11] = 3  # a second piece of nucleus 3
    assert read_labels(save(tmp_path / "x.png", mask)).max() == 2


def test_negative_ids_are_refused(tmp_path):
    labels = label_map().astype(np.int32)
    labels[0, 0] = -1
    with refused("x.tif", "negative"):
        read_labels(save(tmp_path / "x.tif", labels))


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.bmp"])
def test_colour_masks_are_refused(tmp_path, name):
    options = {"photometric": "rgb"} if name == "x.tif" else {}
    with refused(name, "one channel"):
        read_labels(save(tmp_path / name, rgb(), **options))


def test_lossy_masks_are_refused(tmp_path):
    with refused("x.jpg", "JPEG", "PNG"):
        read_labels(save(tmp_path / "x.jpg", label_map().astype(np.uint8)))
    with refused("x.tif", "JPEG", "PNG"):
        read_labels(save(tmp_path / "x.tif", label_map(64, 64).astype(np.uint8), compression="jpeg"))


# ---- ImageFolder -------------------------------------------------------------------------------------


def make_folder(root, names=("b/two", "a/one", "zero"), image=".png", mask=".tif"):
    for name in names:
        save(root / "images" / f"{name}{image}", rgb())
        save(root / "masks" / f"{name}{mask}", label_map())
    return root / "images", root / "masks"


def test_image_folder_pairs_by_name(tmp_path):
    images, masks = make_folder(tmp_path, image=".PNG")
    (images / "Thumbs.db").write_text("x")
    (images / "._zero.png").write_text("x")
    (images / ".hidden").mkdir()
    (images / ".hidden" / "three.png").write_text("x")
    data = ImageFolder(images, masks)
    assert list(data.table.itertuples(index=False, name=None)) == [("", "zero"), ("a", "one"), ("b", "two")]
    sample = data[1]
    assert isinstance(sample, Sample) and (sample.tissue, sample.stem, sample.vague) == ("a", "one", None)
    assert sample.image.shape == (8, 12, 3) and sample.labels.max() == 2
    assert [s.stem for s in data] == ["zero", "one", "two"] and data[-1].stem == "two"
    assert data[np.int64(2)].stem == "two"
    with pytest.raises(IndexError):
        data[3]
    assert len(pickle.loads(pickle.dumps(data))) == 3


def test_same_stem_in_two_tissues(tmp_path):
    data = ImageFolder(*make_folder(tmp_path, ["a/x", "b/x"]))
    assert [(s.tissue, s.stem) for s in data] == [("a", "x"), ("b", "x")]


def test_unpaired_files_are_refused(tmp_path):
    images, masks = make_folder(tmp_path)
    (masks / "a" / "one.tif").unlink()
    with refused("one.png", "no mask", "masks"):
        ImageFolder(images, masks)
    (images / "a" / "one.png").unlink()
    (images / "b" / "two.png").unlink()
    with refused("two.tif", "no image"):
        ImageFolder(images, masks)


def test_one_name_twice_is_refused(tmp_path):
    images, masks = make_folder(tmp_path, ["x"])
    save(images / "x.jpg", rgb())
    with refused("x.jpg", "x.png", "same name"):
        ImageFolder(images, masks)


def test_missing_empty_and_nested_folders_are_refused(tmp_path):
    images, masks = make_folder(tmp_path, ["x"])
    with refused("nowhere", "mask folder"):
        ImageFolder(images, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refused("empty", "no images", ".png"):
        ImageFolder(tmp_path / "empty", masks)
    with refused("separate folders"):
        ImageFolder(tmp_path, masks)
    save(masks / "images" / "x.png", rgb())
    for nested in ((images, tmp_path), (masks / "images", masks), (images, images)):
        with refused("separate folders"):
            ImageFolder(*nested)


def test_sizes_that_differ_are_refused(tmp_path):
    images, masks = make_folder(tmp_path, ["x"])
    save(masks / "x.tif", label_map(12, 8))
    data = ImageFolder(images, masks)  # reading is lazy: only the sample fails
    with refused("x.tif", "8 x 12", "12 x 8"):
        data[0]


# ---- NuInsSeg ----------------------------------------------------------------------------------------

FAT = "mouse fat (white and brown)_subscapula"
TREE = [  # in the benchmark's order
    ("human brain", "human_brain_1"),
    ("human brain", "human_brain_10"),
    ("human brain", "human_brain_2"),
    ("human liver", "human_liver_31"),
    ("human salivory gland", "human_salivory_01"),
    ("human tonsile", "human_tonsile_1"),
    (FAT, "mouse_subscapula_01"),
]


@pytest.fixture
def tree(tmp_path):
    """A small NuInsSeg with the quirks of the real one; each image's id tells which it is."""
    root = tmp_path / "NuInsSeg"
    for number, (tissue, stem) in enumerate(TREE):
        image = rgb()
        image[0, 0] = number
        if stem == "human_liver_31":
            image = np.dstack([image, np.full((8, 12), 255, np.uint8)])
        labels = label_map(ids=(number + 2, 99))
        save(root / tissue / "tissue images" / f"{stem}.png", image)
        save(root / tissue / "label masks modify" / f"{stem}.tif", labels)
        save(root / tissue / "label masks" / f"{stem}.tif", labels + 1)
        save(root / tissue / "mask binary" / f"{stem}.png", (labels > 0).astype(np.uint8) * 255)
        for junk in ("Thumbs.db", ".DS_Store", f"._{stem}.png", "notes.txt"):
            (root / tissue / "tissue images" / junk).write_text("junk")
        (root / tissue / "label masks modify" / f"._{stem}.tif").write_text("junk")
    vague = np.zeros((8, 12), np.uint8)
    vague[0, :5] = 255
    save(root / "human brain" / "vague areas" / "mask binary" / "human_brain_10.png", vague)
    save(root / FAT / "vague areas" / "mask binary_vague" / "mouse_subscapula_01.png", 255 - vague)
    (root / "readme.txt").write_text("junk")
    (root / "human brain" / "Imagj_zips").mkdir()
    return root


def test_nuinsseg_reads_the_authors_layout(tree):
    data = NuInsSeg(tree)
    assert list(data.table.columns) == ["tissue", "stem"]
    assert list(data.table.itertuples(index=False, name=None)) == TREE
    for number, sample in enumerate(data):
        assert (sample.tissue, sample.stem) == TREE[number]
        assert sample.image.shape == (8, 12, 3) and sample.image.dtype == np.uint8
        assert (sample.image[0, 0] == number).all()
        assert sample.labels.dtype == np.int32 and sorted(np.unique(sample.labels)) == [0, 1, 2]
        assert np.array_equal(sample.labels > 0, label_map() > 0)
    vague = {s.stem: s.vague for s in data}
    assert vague["human_brain_1"] is None and vague["human_liver_31"] is None
    assert vague["human_brain_10"].dtype == bool and vague["human_brain_10"].sum() == 5
    assert vague["mouse_subscapula_01"].sum() == 8 * 12 - 5


def test_pairs_by_stem_not_by_position(tree):
    """Without one image, every later pair would slip by one if files were paired by position."""
    (tree / "human brain" / "tissue images" / "human_brain_1.png").unlink()
    data = NuInsSeg(tree)
    assert len(data) == len(TREE) - 1
    labels = tifffile.imread(tree / "human brain" / "label masks modify" / "human_brain_10.tif")
    assert data[0].stem == "human_brain_10" and np.array_equal(data[0].labels > 0, labels > 0)
    assert data[0].vague is not None


def test_one_nucleus_in_two_pieces_stays_one(tree):
    labels = np.zeros((8, 12), np.uint16)
    labels[0, 0] = labels[7, 11] = 5
    save(tree / "human liver" / "label masks modify" / "human_liver_31.tif", labels)
    assert NuInsSeg(tree)[3].labels.max() == 1


def test_a_folder_around_the_tissues_is_looked_through(tree):
    (tree.parent / "__MACOSX").mkdir()
    assert len(NuInsSeg(tree.parent)) == len(TREE)


def test_corrected_folder_names_are_known(tree):
    (tree / "human salivory gland").rename(tree / "human salivary gland")
    (tree / "human tonsile").rename(tree / "human tonsil")
    assert list(NuInsSeg(tree).table.itertuples(index=False, name=None)) == TREE
    assert set(TREE) <= set(pinned())


def test_unknown_images_follow_the_list(tree):
    for name in ("human_brain_99", "another_1"):
        save(tree / "human brain" / "tissue images" / f"{name}.png", rgb())
        save(tree / "human brain" / "label masks modify" / f"{name}.tif", label_map())
    table = NuInsSeg(tree).table
    assert list(table["stem"])[len(TREE) :] == ["another_1", "human_brain_99"]
    assert list(table["stem"])[: len(TREE)] == [stem for _, stem in TREE]


def test_nuinsseg_refusals(tree, tmp_path):
    with refused("nowhere", "check the path"):
        NuInsSeg(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refused("empty", "tissue images"):
        NuInsSeg(tmp_path / "empty")
    save(
        tree / FAT / "vague areas" / "mask binary_vague" / "mouse_subscapula_01.png",
        np.zeros((4, 4), np.uint8),
    )
    with refused("mouse_subscapula_01.png", "4 x 4"):
        NuInsSeg(tree)[-1]
    (tree / "human liver" / "label masks modify" / "human_liver_31.tif").unlink()
    with refused("human_liver_31.png", "label masks modify"):
        NuInsSeg(tree)


def test_pinned_list():
    table = nuinsseg_list()
    assert len(table) == 665 and table["nuclei"].sum() == 30_698 and table["tissue"].nunique() == 31
    paths = [f"{tissue}/tissue images/{stem}.png" for tissue, stem in pinned()]
    assert paths == sorted(paths) and len(set(table["stem"])) == 665


# ---- splits ------------------------------------------------------------------------------------------


def check(split, count):
    parts = [split.train, split.val, split.test]
    assert all(list(part) == sorted(set(part)) for part in parts)
    assert sorted(sum(parts, ())) == list(range(count)), "the parts must be disjoint and cover the dataset"


def test_folds_are_the_benchmarks():
    data = Names(pinned())
    splits = folds(data)
    expected = KFold(n_splits=5, shuffle=True, random_state=19).split(range(665))
    for split, (_, test) in zip(splits, expected, strict=True):
        assert split.test == tuple(test)
        check(split, 665)
    assert [s.name for s in splits] == [f"fold {k}" for k in range(1, 6)]
    assert [len(s.test) for s in splits] == [133] * 5
    assert [len(s.val) for s in splits] == [80] * 5
    assert splits[0].test[:5] == (26, 27, 38, 40, 41)  # written out, so that a change in any library shows


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_partial_copy_keeps_its_folds(data):
    """Known images keep their test fold if others are missing, shuffled or added."""
    whole = {name: k for k, s in enumerate(folds(Names(pinned()))) for name in s.names(Names(pinned()))["test"]}
    keep = data.draw(st.integers(120, 665))
    shuffler = random.Random(data.draw(st.integers(0, 1000)))
    names = shuffler.sample(pinned(), keep)
    names += [("own", f"{i}") for i in range(data.draw(st.integers(0, 20)))]
    shuffler.shuffle(names)
    part = Names(names)
    for k, split in enumerate(folds(part)):
        check(split, len(names))
        assert all(whole[name] == k for name in split.names(part)["test"] if not name.startswith("own/"))


def test_a_partial_copy_with_an_empty_fold_is_refused():
    known = Names(pinned())
    first = folds(known)[0].test
    with refused("Fold 2", "fewer folds"):
        folds(Names([pinned()[i] for i in first]))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 60),
    tissues=st.integers(1, 8),
    n=st.integers(2, 7),
    seed=st.integers(0, 2**32 - 1),
    fraction=st.floats(0, 0.9),
)
def test_folds_of_other_data(count, tissues, n, seed, fraction):
    data = names_of(count, tissues)
    if n > count:
        with refused("folds"):
            folds(data, n, seed, fraction)
        return
    splits = folds(data, n, seed, fraction)
    assert splits == folds(data, n, seed, fraction)
    assert sorted(sum((s.test for s in splits), ())) == list(range(count))
    for split in splits:
        check(split, count)
        rest = count - len(split.test)
        wanted = max(round(fraction * rest), 1 if fraction > 0 else 0)
        assert len(split.train) >= 1 and len(split.val) == min(wanted, rest - 1)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(10, 50), n=st.integers(2, 6), seed=st.integers(0, 1000), shuffle=st.integers(0, 99))
def test_folds_follow_names_not_the_order_of_files(count, n, seed, shuffle):
    """As scikit-learn's over the sorted names, however the dataset happens to be ordered."""
    names = [("", f"{i:03}") for i in range(count)]
    mixed = Names(random.Random(shuffle).sample(names, count))
    expected = KFold(n, shuffle=True, random_state=seed).split(range(count))
    for split, other, (_, test) in zip(folds(mixed, n, seed), folds(Names(names), n, seed), expected, strict=True):
        assert split.names(mixed)["test"] == sorted(f"/{names[i][1]}" for i in test)
        assert split.file_list_hash(mixed) == other.file_list_hash(Names(names))


def test_val_is_stratified_by_tissue():
    data = Names(pinned())
    tissue = data.table["tissue"].to_numpy()
    for split in folds(data):
        rest = np.sort([*split.train, *split.val])
        for name in np.unique(tissue):
            images = int((tissue[rest] == name).sum())
            held = int((tissue[list(split.val)] == name).sum())
            assert abs(held - 0.15 * images) <= 1 and held < images
    assert folds(data)[0].val != folds(data, seed=20)[0].val


def test_val_fraction_zero_and_bad_options():
    data = names_of(20)
    assert all(s.val == () for s in folds(data, val_fraction=0))
    for fraction in (-0.1, 1, 1.5, float("nan")):
        with refused("val_fraction"):
            folds(data, val_fraction=fraction)
    for seed in (-1, 2**32):
        with refused("seed"):
            leave_one_tissue_out(names_of(20, 2), seed=seed)
    for n in (0, 1, 21):
        with refused("folds"):
            folds(data, n)
    with refused("two images 'a/x'"):
        folds(Names([("a", "x"), ("a", "x"), ("a", "y")]))


def test_leave_one_tissue_out():
    data = Names(pinned())
    splits = leave_one_tissue_out(data)
    assert [s.name for s in splits] == sorted(set(data.table["tissue"])) and len(splits) == 31
    for split in splits:
        check(split, 665)
        assert set(data.table["tissue"].iloc[list(split.test)]) == {split.name}
        assert split.name not in set(data.table["tissue"].iloc[[*split.train, *split.val]])
        assert len(split.val) == round(0.15 * (665 - len(split.test)))
    assert splits == leave_one_tissue_out(data)
    with refused("one tissue"):
        leave_one_tissue_out(names_of(10, 1))


def test_report_folds_have_the_reports_overlap():
    """The counts measured on the report's own code."""
    splits = report_folds(Names(pinned()))
    assert [(len(s.train), len(s.val), len(s.test)) for s in splits] == [(372, 93, 133)] * 5
    assert len({s.test for s in splits}) == 1
    assert [len(set(s.test) & set(s.train)) for s in splits] == [72, 75, 68, 75, 70]
    assert [len(set(s.test) & set(s.val)) for s in splits] == [18, 15, 22, 15, 20]
    three = report_folds(Names(pinned()), n=3)
    assert [(len(s.train), len(s.val), len(s.test)) for s in three] == [(310, 155, 133)] * 3
    assert [len(set(s.test) & set(s.train)) for s in three] == [62, 57, 61]


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 300))
def test_report_folds_of_other_sizes(count):
    splits = report_folds(names_of(count, 3))
    used = int(0.7 * count)
    order = sorted(range(count), key=lambda i: (i % 3, i))
    for split, (train, val) in zip(splits, KFold(5, shuffle=True, random_state=42).split(range(used)), strict=True):
        assert split.train == tuple(sorted(order[i] for i in train))
        assert split.val == tuple(sorted(order[i] for i in val))
        assert len(split.test) == int(0.2 * count)


def test_report_folds_of_too_few():
    for count, n in ((7, 5), (100, 1), (4, 2)):
        with refused("report folds"):
            report_folds(names_of(count), n)


def test_file_list_hash():
    data = Names([("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")])
    split = Split("s", (0, 1), (2,), (3,))
    same = Names([("b", "y"), ("b", "x"), ("a", "y"), ("a", "x")])
    digest = split.file_list_hash(data)
    assert len(digest) == 64
    assert digest == split.file_list_hash(data.table)
    assert digest == Split("other name", (2, 3), (1,), (0,)).file_list_hash(same)
    assert digest != Split("s", (0, 1), (3,), (2,)).file_list_hash(data)
    assert digest != Split("s", (0,), (1, 2), (3,)).file_list_hash(data)
    assert split.names(data) == {"train": ["a/x", "a/y"], "val": ["b/x"], "test": ["b/y"]}
    with pytest.raises(AttributeError):
        split.name = "frozen"


def test_the_list_is_in_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "assets/*" in project["tool"]["setuptools"]["package-data"]["nucseg"]


# ---- the real dataset --------------------------------------------------------------------------------

REAL = os.environ.get("NUCSEG_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="set NUCSEG_DATA to a NuInsSeg folder to run it")


@needs_data
def test_real_names_and_folds():
    data = NuInsSeg(REAL)
    assert list(data.table.itertuples(index=False, name=None)) == pinned()
    assert [len(s.test) for s in folds(data)] == [133] * 5
    assert folds(data)[0].file_list_hash(data) == folds(Names(pinned()))[0].file_list_hash(Names(pinned()))


@needs_data
def test_real_nuclei():
    data = NuInsSeg(REAL)
    counts = [int(read_labels(row.labels, trusted=True).max()) for row in data._rows]
    assert counts == list(nuinsseg_list()["nuclei"]) and sum(counts) == 30_698
    for i in range(0, 665, 80):
        sample = data[i]
        assert sample.image.shape == (512, 512, 3) and sample.image.dtype == np.uint8
        assert sample.labels.shape == (512, 512) and sample.labels.dtype == np.int32
        assert sample.labels.max() == counts[i]


def test_in_memory_reads_each_image_once():
    from blobs import Blobs

    from nucseg.data.datasets import InMemory

    class Counted(Blobs):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    blobs = Counted(4)
    kept = InMemory(blobs)
    assert len(kept) == 4 and kept.name == "synthetic" and kept.table is blobs.table
    assert kept[2] is kept[2] and kept[np.int64(2)] is kept[2]
    assert blobs.reads == 1
    np.testing.assert_array_equal(kept[1].labels, Blobs(4)[1].labels)
    kept.read([2, 3])
    assert blobs.reads == 3
    assert kept[3] is kept[3] and blobs.reads == 3


def test_images_in_memory_are_not_sent_to_processes_that_are_not_forked():
    from blobs import Blobs

    from nucseg.data.datasets import InMemory

    kept = InMemory(Blobs(4))
    empty = len(pickle.dumps(kept))
    kept.read(range(4))
    assert len(pickle.dumps(kept)) == empty
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kept))[1].labels, kept[1].labels)


def test_the_split_of_all_images_holds_back_forty_of_nuinsseg():
    names = Names(nuinsseg_list())
    [split] = all_images(names)
    assert (len(split.train), len(split.val)) == (625, 40) and split.test == split.val
    assert sorted(split.train + split.val) == list(range(665))
    assert len({names.table["tissue"][i] for i in split.val}) >= 20  # spread over the 31 tissues
