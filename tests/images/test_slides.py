"""Images of any size, by windows: each file format gives back the pixels written to it."""

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nucseg.errors import InputError
from nucseg.images.slides import open_slide, read_image
from nucseg.inference.folder import find_images


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


# ---------------------------------------------------------------- colours


def over_white(picture, alpha):
    return np.rint(picture * (alpha / 255) + 255 * (1 - alpha / 255))


def test_transparency_is_blended_over_white(tmp_path, picture):
    alpha = np.random.default_rng(1).integers(0, 256, picture.shape[:2], dtype=np.uint8)[..., None]
    expected = over_white(picture, alpha)
    rgba = np.concatenate([picture, alpha], axis=2)
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    multiplied = np.concatenate([np.rint(picture * (alpha / 255)).astype(np.uint8), alpha], axis=2)
    tifffile.imwrite(tmp_path / "m.tif", multiplied, photometric="rgb", extrasamples=["assocalpha"])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    for image in (tmp_path / "a.tif", tmp_path / "m.tif", tmp_path / "a.png", rgba, Image.fromarray(rgba)):
        with open_slide(image) as slide:
            assert np.abs(slide.read(0, 0, *slide.shape) - expected).max() <= 1
    rgba[..., 3] = 0  # never used by the program that wrote it
    with open_slide(rgba) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, *slide.shape), picture)


def ycbcr(picture):
    return np.asarray(Image.fromarray(picture).convert("YCbCr"))


def smooth(shape=(256, 320)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [190 + 40 * np.sin(x / 30), 130 + 60 * np.cos(y / 40), 180 + 30 * np.sin((x + y) / 50)]
    return np.stack(waves, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("compression", ["lzw", None])
def test_ycbcr_that_no_decoder_converts(tmp_path, compression):
    path = tmp_path / "y.tif"
    options = {"photometric": "ycbcr", "compression": compression, "subsampling": (1, 1), "metadata": None}
    tifffile.imwrite(path, ycbcr(smooth()), **options)
    with open_slide(path) as slide:
        assert np.abs(slide.read(0, 0, *slide.shape).astype(int) - smooth()).max() <= 3
    np.testing.assert_allclose(read_image(path), smooth(), atol=3)


@pytest.mark.parametrize("openslide_too", [True, False])
def test_aperios_jpeg_2000_in_ycbcr(tmp_path, monkeypatch, openslide_too):
    """Compression 33003: the tag says RGB, the codestream holds YCbCr."""
    import imagecodecs

    tiles = [imagecodecs.jpeg2k_encode(ycbcr(smooth((128, 128))), level=0, codecformat="j2k", mct=False)]
    about = "Aperio Image Library v11.2.1\n128x128 [0,0 128x128] (128x128) J2K/YUV16 Q=70|AppMag = 20|MPP = 0.4990"
    tifffile.imwrite(
        tmp_path / "a.svs", iter(tiles), shape=(128, 128, 3), dtype=np.uint8, tile=(128, 128), photometric="rgb",
        compression=33003, description=about, metadata=None,
    )  # fmt: skip
    if not openslide_too:
        monkeypatch.setattr("nucseg.images.slides._openslide_knows", lambda path, tiff: False)
    with open_slide(tmp_path / "a.svs") as slide:
        assert np.abs(slide.read(0, 0, 128, 128).astype(int) - smooth((128, 128))).max() <= 3
        assert slide.um_per_px == pytest.approx(0.499)


def test_grey_counts_palettes_and_ink(tmp_path, picture):
    grey, index = picture[..., 0], picture[..., 0] // 8
    as_rgb = grey[..., None].repeat(3, axis=2)
    tifffile.imwrite(tmp_path / "w.tif", 255 - grey, photometric="miniswhite")
    check(tmp_path / "w.tif", as_rgb)
    tifffile.imwrite(tmp_path / "1.tif", grey > 99, photometric="minisblack")
    check(tmp_path / "1.tif", (255 * (as_rgb > 99)).astype(np.uint8))
    colours = np.random.default_rng(2).integers(0, 256, (3, 256), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "p.tif", index, photometric="palette", colormap=colours * 257)
    check(tmp_path / "p.tif", np.moveaxis(colours[:, index], 0, -1).astype(np.uint8))
    palette = Image.fromarray(index, "P")
    palette.putpalette(colours.T.astype(np.uint8).tobytes())
    palette.save(tmp_path / "p.png")
    check(tmp_path / "p.png", np.moveaxis(colours[:, index], 0, -1).astype(np.uint8))
    ink = np.dstack([picture, grey])
    tifffile.imwrite(tmp_path / "c.tif", ink, photometric="separated", tile=(64, 64))
    check(tmp_path / "c.tif", np.asarray(Image.fromarray(ink, "CMYK").convert("RGB")))


def test_lab_is_refused_and_not_taken_for_rgb(tmp_path, picture):
    tifffile.imwrite(tmp_path / "l.tif", picture, photometric="cielab")
    with pytest.raises(InputError, match=r"l\.tif.*CIELAB"), open_slide(tmp_path / "l.tif"):
        pass


@pytest.mark.parametrize("compression", ["webp", "jpegxl", "jpeg2000"])
def test_other_compressions(tmp_path, compression):
    options = {"photometric": "rgb", "compression": compression, "compressionargs": {"lossless": True}}
    if compression == "jpeg2000":
        options["compressionargs"] = {"level": 0}
    tifffile.imwrite(tmp_path / "a.tif", smooth(), tile=(64, 64), **options)
    check(tmp_path / "a.tif", smooth())


def test_pictures_by_their_content(tmp_path, picture):
    import imagecodecs

    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(picture, lossless=True))
    (tmp_path / "a.jp2").write_bytes(imagecodecs.jpeg2k_encode(picture, level=0))
    for name in ("a.gif", "a.webp"):
        Image.fromarray(picture).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    for name in ("a.jxl", "a.jp2", "a.webp"):
        check(tmp_path / name, picture)
    check(tmp_path / "a.gif", np.asarray(Image.open(tmp_path / "a.gif").convert("RGB")))


def test_a_cameras_jpeg_with_previews(tmp_path):
    one = Image.fromarray(smooth())
    one.save(tmp_path / "a.mpo", format="MPO", save_all=True, append_images=[one.resize((40, 32))], quality=98)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.mpo").read_bytes())
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - smooth()).max() < 12


@pytest.mark.parametrize("turn", range(2, 9))
def test_orientation_tags_turn_nothing(tmp_path, picture, turn):
    """Orientation tags of TIFF and EXIF are ignored, as in ImageJ and QuPath, in which masks are drawn."""
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", extratags=[(274, 3, 1, turn, True)])
    check(tmp_path / "a.tif", picture)
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    check(tmp_path / "a.png", picture)


# ---------------------------------------------------------------- several images in a file


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_three_channels_of_8_bits_are_rgb(tmp_path, picture, kind):
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    options = {"imagej": True} if kind == "imagej" else {"ome": True}
    about = {"axes": "CYX"} | ({"mode": "composite"} if kind == "imagej" else {})
    tifffile.imwrite(path, np.moveaxis(picture, -1, 0), photometric="minisblack", metadata=about, **options)
    check(path, picture)


@pytest.mark.parametrize("name", ["label", "label image", "Macro", "slide_overview"])
def test_the_largest_image_is_read_and_not_a_label_or_thumbnail(tmp_path, picture, name):
    with tifffile.TiffWriter(tmp_path / "t.tif") as writer:
        writer.write(picture[::4, ::4].copy(), photometric="rgb", subfiletype=1)
        writer.write(picture, photometric="rgb", tile=(64, 64))
    check(tmp_path / "t.tif", picture)
    with tifffile.TiffWriter(tmp_path / "l.ome.tif", ome=True) as writer:
        writer.write(np.full((500, 700, 3), 9, np.uint8), photometric="rgb", metadata={"axes": "YXS", "Name": name})
        about = {"axes": "YXS", "PhysicalSizeX": 0.25, "Name": "scan"}
        writer.write(picture, photometric="rgb", tile=(64, 64), subifds=1, metadata=about)
        writer.write(picture[::2, ::2].copy(), photometric="rgb", tile=(64, 64), subfiletype=1)
    check(tmp_path / "l.ome.tif", picture, 0.25)


def test_images_of_equal_rank_are_the_users_choice(tmp_path, picture):
    path = tmp_path / "two.ome.tif"
    other = picture[::-1, :-9].copy()
    with tifffile.TiffWriter(path, ome=True) as writer:
        for image, um in ((picture, 0.25), (other, 0.5)):
            writer.write(image, photometric="rgb", tile=(64, 64), metadata={"axes": "YXS", "PhysicalSizeX": um})
    with pytest.raises(InputError, match=r"two\.ome\.tif.*1 \(420 x 300 px\), 2 \(411 x 300 px\).*--series"):
        read_image(path)
    for number, image, um in ((1, picture, 0.25), (2, other, 0.5)):
        with open_slide(path, number) as slide:
            np.testing.assert_array_equal(slide.read(0, 0, *slide.shape), image)
            assert slide.um_per_px == um
    with pytest.raises(InputError, match="1 to 2, not 3"):
        read_image(path, 3)


def test_missing_tiles_are_white(tmp_path, picture):
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, picture, photometric="rgb", tile=(128, 128), compression="zlib")
    raw = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for name in ("TileOffsets", "TileByteCounts"):  # of the second tile in the first row
            tag = tiff.pages.first.tags[name]
            size = tag.valuebytecount // tag.count
            raw[tag.valueoffset + size : tag.valueoffset + 2 * size] = bytes(size)
    path.write_bytes(raw)
    expected = picture.copy()
    expected[:128, 128:256] = 255
    check(path, expected)
    np.testing.assert_array_equal(read_image(path), expected)


# ---------------------------------------------------------------- slides in vendor formats


def aperio(path, image):
    """A small SVS as Aperio's scanners write it: the scan, a thumbnail, a level, the label, the macro picture."""
    height, width = image.shape[:2]
    head = f"Aperio Image Library v11.2.1\r\n{width}x{height} [0,0 {width}x{height}] (240x240)"
    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 90}, "metadata": None}
    with tifffile.TiffWriter(path) as writer:

        def write(pixels, **more):
            writer.write(pixels, software=False, **options, **more)

        write(image, tile=(240, 240), description=head + " JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990")
        write(image[::8, ::8].copy(), rowsperstrip=16, description=head + " -> thumbnail - |AppMag = 20")
        write(image[::2, ::2].copy(), tile=(240, 240), description=head + " -> JPEG/RGB Q=70")
        still = {"rowsperstrip": 16}
        label, macro = np.full((300, 90, 3), (250, 200, 0), np.uint8), np.full((100, 900, 3), (0, 200, 0), np.uint8)
        write(label, description="Aperio Image Library v11.2.1\r\nlabel 90x300", subfiletype=1, **still)
        write(macro, description="Aperio Image Library v11.2.1\r\nmacro 900x100", subfiletype=9, **still)


def test_an_aperio_slide_through_openslide_and_tifffile(tmp_path, monkeypatch):
    image = smooth((600, 800))
    aperio(tmp_path / "a.svs", image)
    found = []
    for knows in (True, False):
        if not knows:
            monkeypatch.setattr("nucseg.images.slides._openslide_knows", lambda path, tiff: False)
        with open_slide(tmp_path / "a.svs") as slide:
            assert slide.um_per_px == pytest.approx(0.499) and slide.shape == (600, 800)
            assert [level.shape for level in slide.levels] == [(600, 800), (300, 400)]
            half = slide.levels[1].read(10, 20, 100, 200)
            found.append((slide.read(37, 101, 180, 222), half))
    for a, b in zip(*found, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 2
    assert np.abs(found[0][0].astype(int) - image[37:217, 101:323]).max() <= 16
    assert np.abs(found[0][1].astype(int) - image[20:220:2, 40:440:2]).max() <= 16


def hamamatsu(path, image):
    """A small NDPI: each resolution one JPEG strip, with Hamamatsu's own tags (as OpenSlide's source lists them)."""
    with tifffile.TiffWriter(path, byteorder="<") as writer:
        for step, lens in ((1, 20.0), (4, 5.0), (8, -1.0)):  # -1: the macro picture
            pixels = ycbcr(image[::step, ::step])
            own = [(65420, 4, 1, 1, True), (65421, 11, 1, lens, True)]
            own += [(tag, 9, 1, 0, True) for tag in (65422, 65423, 65424)]
            writer.write(
                pixels, photometric="ycbcr", subsampling=(1, 1), compression="jpeg", compressionargs={"level": 95},
                rowsperstrip=len(pixels), resolution=(20000 / step,) * 2, resolutionunit="CENTIMETER", metadata=None,
                software="NDP.scan", extratags=own,
            )  # fmt: skip


def dicom(path, image, tile=256, um=0.5, series=None):
    """A small DICOM whole-slide image of one level, tiled, JPEG (VL Whole Slide Microscopy Image Storage)."""
    pydicom = pytest.importorskip("pydicom")
    import imagecodecs
    from pydicom.encaps import encapsulate

    new = pydicom.uid.generate_uid
    frames = []
    for top, left in np.ndindex(-(-image.shape[0] // tile), -(-image.shape[1] // tile)):
        part = image[top * tile : (top + 1) * tile, left * tile : (left + 1) * tile]
        part = np.pad(part, [(0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)], mode="edge")
        frames.append(imagecodecs.jpeg_encode(part, level=95, colorspace="rgb", outcolorspace="ycbcr"))
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = new(), pydicom.uid.JPEGBaseline8Bit
    one = pydicom.Dataset()
    one.file_meta = meta
    one.SOPClassUID, one.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    one.SeriesInstanceUID, one.Modality = series or new(), "SM"
    one.StudyInstanceUID, one.FrameOfReferenceUID = new(), new()
    one.ImageType, one.Rows, one.Columns = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], tile, tile
    one.TotalPixelMatrixRows, one.TotalPixelMatrixColumns = image.shape[:2]
    one.NumberOfFrames, one.SamplesPerPixel, one.PlanarConfiguration = len(frames), 3, 0
    one.PhotometricInterpretation, one.BitsAllocated, one.BitsStored = "YBR_FULL_422", 8, 8
    one.HighBit, one.PixelRepresentation, one.DimensionOrganizationType = 7, 0, "TILED_FULL"
    one.TotalPixelMatrixFocalPlanes = one.NumberOfOpticalPaths = 1
    measures, groups, path_ = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = [um / 1000] * 2, 0.001
    groups.PixelMeasuresSequence, path_.OpticalPathIdentifier = [measures], "0"
    one.SharedFunctionalGroupsSequence, one.OpticalPathSequence = [groups], [path_]
    one.PixelData = encapsulate(frames)
    one["PixelData"].is_undefined_length = True
    one.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("make, name", [(hamamatsu, "a.ndpi"), (dicom, "a.dcm")])
def test_slides_of_other_makers(tmp_path, make, name):
    image = smooth((600, 800))
    make(tmp_path / name, image)
    with open_slide(tmp_path / name) as slide:
        assert slide.shape == (600, 800) and slide.um_per_px == pytest.approx(0.5)
        assert np.abs(slide.read(37, 101, 500, 600).astype(int) - image[37:537, 101:701]).max() <= 12


def test_the_files_of_a_dicom_slide_are_one_image(tmp_path, monkeypatch):
    pydicom = pytest.importorskip("pydicom")
    image, series = smooth((600, 800)), pydicom.uid.generate_uid()
    dicom(tmp_path / "1.dcm", image, series=series)
    dicom(tmp_path / "2.dcm", image[::2, ::2], um=1.0, series=series)
    dicom(tmp_path / "other.dcm", image)
    with open_slide(tmp_path / "2.dcm") as slide:
        assert [level.shape for level in slide.levels] == [(600, 800), (300, 400)]
        assert slide.um_per_px == pytest.approx(0.5)
    assert [job.name for job in find_images([tmp_path])] == ["1.dcm", "other.dcm"]


def test_a_slide_without_openslide_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "a.mrxs").write_bytes(b"not a slide")
    with pytest.raises(InputError, match=r"a\.mrxs.*nucseg\[slides\]"), open_slide(tmp_path / "a.mrxs"):
        pass


def test_the_level_that_is_fine_enough(tmp_path):
    image = smooth((600, 800))
    aperio(tmp_path / "a.svs", image)
    with open_slide(tmp_path / "a.svs") as slide:
        assert [slide.at(scale).shape[0] for scale in (2, 1, 0.6, 0.5, 0.1)] == [600, 600, 600, 300, 300]
        assert slide.at(0.5).um_per_px == pytest.approx(2 * 0.499)
        small = slide.overview(200)
        assert small.shape == (150, 200, 3)
        mean = image.reshape(150, 4, 200, 4, 3).mean((1, 3))
        assert np.abs(small - mean).mean() < 4


# ---------------------------------------------------------------- black is not tissue


def test_black_areas_are_white_however_the_image_is_cut(picture):
    image = np.maximum(picture, 60)
    image[:, :100] = 3
    image[200:, 300:] = np.random.default_rng(3).integers(0, 12, (100, 120, 3))  # as JPEG leaves it
    image[40:44, 200:204] = 0  # a few dark px of a nucleus
    with open_slide(image) as slide:
        whole, void = slide.read_tissue(0, 0, *slide.shape)
        assert void[:, :100].all() and void[200:, 300:].all() and (whole[void] == 255).all()
        assert not void[40:44, 200:204].any() and void.sum() == 300 * 100 + 100 * 120
        for top, left, height, width in ((0, 90, 50, 60), (190, 295, 20, 30), (100, 0, 100, 420)):
            part, there = slide.read_tissue(top, left, height, width)
            window = np.s_[top : top + height, left : left + width]
            np.testing.assert_array_equal(there, void[window])
            np.testing.assert_array_equal(part, whole[window])


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


@pytest.mark.parametrize("thing, words", [
    (np.zeros((9, 9, 3)), r"float64.*\(255 \* image\)"),
    (np.full((9, 9, 3), 200.0), r"float64.*scaled to 0..255"),
    (np.zeros((3, 9, 9), np.uint8), r"numpy.moveaxis"),
    (np.zeros((9, 9, 5), np.uint8), r"9 x 9 x 5"),
    (np.zeros((0, 9, 3), np.uint8), r"0 x 9 x 3"),
    ([[[0, 0, 0]]], r"list: pass numpy.asarray"),
    (None, "NoneType"),
    (Image.new("I;16", (9, 9)), "mode I;16"),
])  # fmt: skip
def test_other_objects_are_refused_with_what_to_convert(thing, words):
    with pytest.raises(InputError, match=words), open_slide(thing):
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
