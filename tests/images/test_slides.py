"""Images of any size, by windows: each file format against what was put into it."""

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nucseg.errors import InputError
from nucseg.images.slides import open_slide


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)


WINDOW = (37, 101, 180, 222)


def check(path, picture, um_per_px=None):
    top, left, height, width = WINDOW
    with open_slide(path) as slide:
        assert slide.shape == picture.shape[:2]
        np.testing.assert_array_equal(slide.read(*WINDOW), picture[top : top + height, left : left + width])
        assert slide.um_per_px == (None if um_per_px is None else pytest.approx(um_per_px, rel=1e-3))


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_tiffs_in_strips_and_tiles(tmp_path, picture, tile, compression):
    path = tmp_path / "a.tif"
    kind = {} if tile is None else {"tile": tile}
    tifffile.imwrite(
        path, picture, photometric="rgb", compression=compression, rowsperstrip=None if tile else 16, **kind
    )
    check(path, picture)


def test_planar_grey_and_alpha(tmp_path, picture):
    planes = np.moveaxis(picture, -1, 0)
    tifffile.imwrite(tmp_path / "p.tif", planes, photometric="rgb", planarconfig="separate")
    check(tmp_path / "p.tif", picture)
    tifffile.imwrite(tmp_path / "g.tif", picture[..., 0], photometric="minisblack")
    check(tmp_path / "g.tif", np.repeat(picture[..., :1], 3, axis=2))
    alpha = np.concatenate([picture, picture[..., :1]], axis=2)
    tifffile.imwrite(tmp_path / "a.tif", alpha, photometric="rgb", extrasamples=["unassalpha"])
    check(tmp_path / "a.tif", picture)
    Image.fromarray(picture).save(tmp_path / "a.png")
    check(tmp_path / "a.png", picture)
    check(picture, picture)


def test_of_a_pyramid_the_largest_level(tmp_path, picture):
    path = tmp_path / "pyramid.ome.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        about = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
        writer.write(picture, subifds=1, tile=(64, 64), photometric="rgb", metadata=about)
        writer.write(picture[::2, ::2], subfiletype=1, tile=(64, 64), photometric="rgb")
    check(path, picture, 0.5)


def test_resolutions(tmp_path, picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture, photometric="rgb", resolution=(40000, 40000), resolutionunit="CENTIMETER")
    check(path, picture, 0.25)
    tifffile.imwrite(path, picture, photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    check(path, picture)  # a printer's
    tifffile.imwrite(path, picture, photometric="rgb", resolution=(1, 1), resolutionunit="CENTIMETER")
    check(path, picture)  # a default: 10,000 µm
    tifffile.imwrite(path, picture, photometric="rgb", description="Aperio Image Library\n|AppMag = 20|MPP = 0.4990")
    check(path, picture, 0.499)


def test_what_cannot_be_read_says_so(tmp_path, picture):
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, picture.astype(np.uint16), photometric="rgb")
    with pytest.raises(InputError, match="8 bit"), open_slide(path):
        pass
    tifffile.imwrite(path, np.zeros((5, 64, 64), np.uint8), photometric="minisblack")
    with pytest.raises(InputError, match="single flat"), open_slide(path):
        pass
    with pytest.raises(InputError, match="does not exist"), open_slide(tmp_path / "none.tif"):
        pass
    with pytest.raises(InputError, match="uint8"), open_slide(picture.astype(float)):
        pass


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_tiff_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tiff") / "a.tif"
    tifffile.imwrite(path, np.full((40, 40, 3), 99, np.uint8), photometric="rgb", tile=(16, 16), compression="zlib")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(4, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(8, len(raw)))])
    try:
        with open_slide(path) as slide:
            height, width = min(slide.shape[0], 40), min(slide.shape[1], 40)
            assert slide.read(0, 0, height, width).shape == (height, width, 3)
    except InputError as error:
        assert str(path) in str(error)
