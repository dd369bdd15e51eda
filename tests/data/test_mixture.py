import numpy as np
import pytest
from bbbc038 import write_bbbc038
from blobs import Blobs
from hypothesis import given
from hypothesis import strategies as st

from nucseg.data import mixture
from nucseg.data.bbbc038 import fields, held_out_histology
from nucseg.data.datasets import Fresh, ImageFolder, content_hash
from nucseg.data.mixture import SHARES, PretrainingImages, _divide
from nucseg.data.splits import given_parts
from nucseg.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    table = fields()
    stems = [table["image"][table["field"] == k].iloc[0] for k in (1, 2, 3, 5, 6)]
    return write_bbbc038(tmp_path_factory.mktemp("bbbc038"), stems)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Images of 160 px, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "SIZE", 160)
        yield


@pytest.fixture(scope="module")
def images(folder):
    return PretrainingImages(folder, seed=4, windows=40, validation=2)


def test_no_training_image_comes_from_a_held_out_one(images, folder):
    real = images._real.table
    train = [real["stem"][i] for name in ("restained", "histology", "brightfield") for i in images._sources[name]]
    assert not {stem[:12] for stem in train} & set(held_out_histology()) and len(train) == 2 + 3 + 3
    table = images.table
    assert set(table["stem"][(table["part"] == "test")]) <= set(held_out_histology())
    assert (table["part"] == "test").sum() == 2


@given(st.integers(1, 5000), st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any))
def test_windows_are_divided_by_the_shares(windows, parts):
    shares = dict(zip(SHARES, [part / sum(parts) for part in parts], strict=True))
    counts = _divide(windows, shares)
    assert sum(counts.values()) == windows
    assert all(abs(counts[kind] - windows * share) <= 1 for kind, share in shares.items())


@pytest.mark.parametrize("wrong", [{"synthetic": 1.0}, dict.fromkeys(SHARES, 0.3), {**SHARES, "synthetic": -0.5}])
def test_wrong_shares_are_refused(folder, wrong):
    with pytest.raises(InputError, match="add up to 1"):
        PretrainingImages(folder, shares=wrong)


def test_a_folder_without_a_kind_is_refused(tmp_path):
    write_bbbc038(tmp_path, ["01d44a26f668"], kinds=("brightfield",))
    with pytest.raises(InputError, match="no images for 'restained'"):
        PretrainingImages(tmp_path)
    only = {"synthetic": 0.9, "restained": 0.0, "histology": 0.05, "brightfield": 0.05}
    assert len(PretrainingImages(tmp_path, windows=20, shares=only, validation=0)) == 20


def test_the_table_names_kinds_and_parts(images):
    train = images.table[images.table["part"] == "train"]
    assert train["tissue"].value_counts().to_dict() == {
        "synthetic": 20,
        "restained": 10,
        "histology": 8,
        "brightfield": 2,
    }
    (split,) = given_parts(images)
    assert len(split.train) == 40 and len(split.val) == 2 + 1 and len(split.test) == 2
    assert isinstance(images, Fresh)
    assert not set(split.train) & (set(split.val) | set(split.test))


def test_the_copy_of_the_images_is_hashed(images, folder):
    """Original and corrected masks of BBBC038 make different runs: `content_hash` tells them apart on resuming."""
    assert content_hash(images) == ImageFolder(folder / "images", folder / "masks").content_hash()
    assert len(content_hash(images)) == 64


def test_windows_of_one_image_share_it_and_epochs_do_not(images):
    for kind in SHARES:
        rows = np.flatnonzero((images.table["tissue"] == kind) & (images.table["part"] == "train"))
        first = images.draw(0, rows[0])
        assert images.draw(0, rows[min(len(rows), mixture.PER_IMAGE) - 1]) is first
        assert images.draw(1, rows[0]).image.tobytes() != first.image.tobytes(), kind
        assert images.draw(0, rows[0]).image.tobytes() == first.image.tobytes(), kind
        assert first.labels.dtype == np.int32 and first.image.shape[:2] == first.labels.shape


def test_images_depend_on_seed_epoch_and_row_alone(images, folder):
    """A run resumed in epoch 3 in another process gets the same images: earlier draws have no influence."""
    again = PretrainingImages(folder, seed=4, windows=40, validation=2)
    other = PretrainingImages(folder, seed=5, windows=40, validation=2)
    for row in (0, 19, 25, 35, 39):
        one = images.draw(3, row)
        two, three = again.draw(3, row), other.draw(3, row)
        assert one.image.tobytes() == two.image.tobytes() and one.labels.tobytes() == two.labels.tobytes()
        assert one.image.tobytes() != three.image.tobytes()


def test_validation_and_test_images_never_change(images, folder):
    other = PretrainingImages(folder, seed=99, windows=8, validation=2)
    for part in ("val", "test"):
        mine, theirs = (np.flatnonzero(data.table["part"] == part) for data in (images, other))
        for i, j in zip(mine, theirs, strict=True):
            assert images[i].image.tobytes() == images.draw(7, i).image.tobytes() == other[j].image.tobytes()
            assert images[i].stem == images.table["stem"][i]


def test_real_images_come_in_turn(images):
    """Each source is used once before any is used again, across epochs too."""
    sources = images._sources["histology"]
    turns = [images._in_turn("histology", epoch, slot) for epoch in range(3) for slot in range(2)]
    pairs = [set(turns[i : i + 2]) for i in range(0, 6, 2)]
    assert all(pair == set(sources) for pair in pairs)


def test_only_the_images_of_one_epoch_are_kept(images):
    for row in range(40):
        images.draw(5, row)
    assert len(images._drawn) == 4 + 2 + 2 + 1
    images.draw(6, 0)
    assert len(images._drawn) == 1


def test_a_dataset_without_parts_is_refused():
    with pytest.raises(InputError, match="names its parts"):
        given_parts(Blobs(4))
