"""Pixel sizes from every kind of metadata."""

import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image

from nucseg.images.pixel_size import estimate, from_ome, in_um, of_sides
from nucseg.images.slides import open_slide

IMAGE = np.full((20, 30, 3), 200, np.uint8)


def size_of(path):
    with open_slide(path) as slide:
        return None if slide.um_per_px is None else round(slide.um_per_px, 5)


@pytest.mark.parametrize("unit, um", [
    ("nm", 1e-3), ("µm", 1), ("μm", 1), ("um", 1), ("micron", 1), ("Microns", 1), ("micrometer", 1), ("mm", 1e3),
    ("cm", 1e4), ("m", 1e6), ("Å", 1e-4), ("\\u00B5m", 1), ("&#181;m", 1), ("inch", 25400), ("micrometres", 1),
    ("", 1), (None, 1), ("pixel", None), ("pixels", None), ("reference frame", None), ("furlong", None),
])  # fmt: skip
def test_units(unit, um):
    assert in_um("2", unit) == (None if um is None else pytest.approx(2 * um))
    assert in_um("many", unit) is None and in_um("nan", unit) is None


def ome(attributes, width=30):
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{width}" SizeY="20" '
        f'SizeZ="1" SizeC="3" SizeT="1" {attributes}><Channel ID="Channel:0" SamplesPerPixel="3"/>'
        '<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )


@pytest.mark.parametrize("attributes, um", [
    ('PhysicalSizeX="250" PhysicalSizeXUnit="nm"', 0.25),
    ('PhysicalSizeXUnit="nm" PhysicalSizeX="250"', 0.25),
    ('PhysicalSizeX="0.25" PhysicalSizeXUnit="μm"', 0.25),
    ('PhysicalSizeX="0.00025" PhysicalSizeXUnit="mm"', 0.25),
    ('PhysicalSizeX="0.5"', 0.5),
    ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel"', None),
    ("", None),
])  # fmt: skip
def test_ome_files(tmp_path, attributes, um):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", description=ome(attributes).encode(), metadata=None)
    assert size_of(path) == um


def test_a_size_that_no_microscope_has_is_said_and_not_used(tmp_path):
    path = tmp_path / "a.ome.tif"
    text = ome('PhysicalSizeXUnit="nm" PhysicalSizeX="1.0"')
    tifffile.imwrite(path, IMAGE, photometric="rgb", description=text.encode(), metadata=None)
    with pytest.warns(UserWarning, match=r"0\.001 µm/px"):
        assert size_of(path) is None


def test_of_several_images_the_one_that_is_read():
    both = ome('PhysicalSizeX="0.25"').replace("</OME>", "") + ome('PhysicalSizeX="9"', 10).split("<Image", 1)[1].join(
        ["<Image", ""]
    )
    assert from_ome(both, (20, 30), 0) == 0.25 and from_ome(both, (20, 10), 1) == 9
    assert from_ome("<OME", (20, 30)) is None


@pytest.mark.parametrize("unit, across, um", [
    ("micron", 4, 0.25), ("microns", 4, 0.25), ("um", 2, 0.5), ("\\u00B5m", 4, 0.25), ("mm", 4000, 0.25),
    ("nm", 0.004, 0.25), ("cm", 40000, 0.25), ("inch", 72, None), ("inch", 101600, 0.25), ("pixel", 1, None),
])  # fmt: skip
def test_imagejs_units(tmp_path, unit, across, um):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, imagej=True, resolution=(across, across), metadata={"unit": unit})
    assert size_of(path) == um


@pytest.mark.parametrize("unit, across, um", [
    ("CENTIMETER", 40000, 0.25), ("CENTIMETER", 1, None), ("INCH", 72, None), ("INCH", 300, None),
    ("INCH", 50800, 0.5), ("NONE", 4, None), ("MICROMETER", 4, 0.25), ("MILLIMETER", 2000, 0.5),
])  # fmt: skip
def test_resolution_tags(tmp_path, unit, across, um):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", resolution=(across, across), resolutionunit=unit)
    assert size_of(path) == um


def test_pixels_that_are_not_square_are_said(tmp_path):
    """0.25 x 0.36 µm: the side of a square of the same area is 0.3 µm."""
    path = tmp_path / "a.tif"
    tags = {"resolution": ((40000, 1), (250000, 9)), "resolutionunit": "CENTIMETER"}
    ij = {"imagej": True, "resolution": ((4, 1), (25, 9)), "metadata": {"unit": "um"}}
    xml = 'PhysicalSizeX="0.25" PhysicalSizeXUnit="µm" PhysicalSizeY="360" PhysicalSizeYUnit="nm"'
    for options in (tags, ij, {"description": ome(xml).encode(), "metadata": None}):
        tifffile.imwrite(path, IMAGE, photometric="rgb", **options)
        with pytest.warns(UserWarning, match=r"a\.tif' has pixels of 0\.25 x 0\.36 µm, .* not square.*scale it"):
            assert size_of(path) == pytest.approx(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of_sides(0.25, 0.251) == pytest.approx(0.2505, abs=1e-4)  # a scanner's calibration
        assert of_sides(0.25, None) == 0.25 and of_sides(None, 0.25) is None and of_sides(0.25, 0) == 0.25


def test_a_magnification_is_a_guess_with_a_warning(tmp_path, monkeypatch):
    path = tmp_path / "a.svs"
    for knows in (True, False):
        about = "Aperio Image Library v11.2.1\n30x20 [0,0 30x20] (16x16)|AppMag = 20"
        tifffile.imwrite(path, IMAGE, photometric="rgb", tile=(16, 16), description=about, metadata=None)
        if not knows:
            monkeypatch.setattr("nucseg.images.slides._openslide_knows", lambda path, tiff: False)
        with pytest.warns(UserWarning, match=r"a\.svs.*20x.*0\.5 µm/px.*--um-per-px"):
            assert size_of(path) == 0.5


def test_pictures_say_it_in_dots_per_inch(tmp_path):
    for dpi, um in ((101600, 0.25), (72, None)):
        Image.fromarray(IMAGE).save(tmp_path / "a.png", dpi=(dpi, dpi))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert size_of(tmp_path / "a.png") == (um and pytest.approx(um, rel=1e-3))


def test_the_size_that_nuclei_suggest():
    assert estimate(32) == 0.25 and estimate(16) == 0.5
