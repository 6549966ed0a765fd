"""Image files: every kind becomes upright 8-bit RGB, and whatever is wrong with a file is one sentence."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from dicom_files import RAMP, gray, write_dicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, JPEGLSLossless

from medv.data.images import ImageError, open_image, resolve_image

SHARED = Path(os.environ.get("MEDV_SHARED", Path(__file__).parents[1] / "../shared"))


@pytest.mark.parametrize("suffix, mode", [*[("png", m) for m in ("1", "L", "P", "RGB")], ("jpg", "L"), ("jpg", "CMYK")])
def test_every_mode_becomes_rgb_of_the_same_size(tmp_path, suffix, mode):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP).convert(mode).save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    assert image.size == (64, 48)
    assert np.corrcoef(gray(image).ravel(), RAMP.ravel())[0, 1] > 0.5  # mode 1 is dithered


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_brightness_order_and_range_survive_whatever_the_depth(tmp_path, dtype):
    picture = RAMP if dtype == np.uint8 else (RAMP.astype(np.uint16) * 12 + 400)  # a 12-bit scan in 16 bits
    Image.fromarray(picture).save(tmp_path / "x.png")
    seen = gray(open_image(tmp_path / "x.png"))
    assert (np.diff(seen.ravel()) >= 0).all()
    assert seen.min() == 0
    assert seen.max() == 255


@pytest.mark.parametrize("value", [0, 1000, 65535])
def test_a_constant_deep_image_does_not_divide_by_zero(tmp_path, value):
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").size == (8, 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_black_and_opaque_ones_unchanged(tmp_path, mode):
    picture = Image.new(mode, (4, 2), (200, 200, 200, 255) if mode == "RGBA" else (200, 255))
    picture.putpixel((0, 0), (200, 200, 200, 0) if mode == "RGBA" else (200, 0))
    picture.save(tmp_path / "x.png")
    image = open_image(tmp_path / "x.png")
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((1, 1)) == (200, 200, 200)


def test_a_transparent_palette_color_is_black(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "x.png", transparency=0)
    image = open_image(tmp_path / "x.png")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (200, 100, 50)]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(RAMP).save(tmp_path / "x.jpg", exif=exif)
    image = open_image(tmp_path / "x.jpg")
    assert image.size == (48, 64)
    assert gray(image)[:, -1].mean() < gray(image)[:, 0].mean() - 200  # the dark top is now on the right


def test_broken_exif_does_not_hide_the_picture(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "x.jpg", exif=b"Exif\0\0not a TIFF header at all")
    assert open_image(tmp_path / "x.jpg").size == (64, 48)


def test_dicom_window_of_the_header_is_applied(tmp_path):
    hounsfield = np.array([[-1000, -160, 40, 240, 3000]], np.int16)
    write_dicom(tmp_path / "x.dcm", hounsfield + 1024, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    seen = gray(open_image(tmp_path / "x.dcm"))[0]
    assert seen[0] == seen[1] == 0
    assert abs(seen[2] - 128) <= 1
    assert seen[3] == seen[4] == 255


def test_dicom_takes_the_first_of_several_windows(tmp_path):
    pixels = np.array([[0, 100, 200]], np.int16)
    fields = {"WindowCenter": [100, 1000], "WindowWidth": [200, 2000]}
    write_dicom(tmp_path / "x.dcm", pixels, **fields)
    assert gray(open_image(tmp_path / "x.dcm"))[0].tolist()[::2] == [0, 255]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_dicom_windows_are_monotonic_about_their_center(tmp_path, function):
    pixels = np.arange(400, dtype=np.int16).reshape(20, 20)
    fields = {"WindowCenter": 200, "WindowWidth": 100, "VOILUTFunction": function}
    write_dicom(tmp_path / "x.dcm", pixels, **fields)
    seen = gray(open_image(tmp_path / "x.dcm")).ravel()
    assert (np.diff(seen) >= 0).all()
    assert abs(seen[200] - 128) <= 2


@pytest.mark.parametrize("fields", [{}, {"WindowCenter": 100, "WindowWidth": 0}, {"PixelPaddingValue": -2000}])
def test_dicom_without_a_usable_window_is_stretched(tmp_path, fields):
    pixels = np.arange(100, 500, dtype=np.int16).reshape(20, 20)
    if "PixelPaddingValue" in fields:
        pixels[:5] = -2000
    write_dicom(tmp_path / "x.dcm", pixels, **fields)
    seen = gray(open_image(tmp_path / "x.dcm"))
    valid = seen[pixels >= 0]
    assert valid.min() == 0
    assert valid.max() == 255
    assert (np.diff(valid) >= 0).all()


def test_monochrome1_is_the_negative_of_monochrome2(tmp_path):
    pixels = RAMP.astype(np.uint16)
    one = open_image(write_dicom(tmp_path / "1.dcm", pixels, PhotometricInterpretation="MONOCHROME1"))
    two = open_image(write_dicom(tmp_path / "2.dcm", pixels))
    assert np.abs(gray(one) + gray(two) - 255).max() <= 1


def test_dicom_shows_the_middle_of_several_frames(tmp_path):
    pixels = np.stack([np.full((6, 5), 10), np.tile(np.arange(5), (6, 1)), np.full((6, 5), 99)]).astype(np.uint8)
    write_dicom(tmp_path / "x.dcm", pixels, NumberOfFrames=3)
    assert gray(open_image(tmp_path / "x.dcm"))[0].tolist() == [0, 64, 128, 191, 255]


def test_rgb_dicom_keeps_its_colors(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, :, 0] = 255
    fields = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    image = open_image(write_dicom(tmp_path / "x.dcm", pixels, **fields))
    assert [image.getpixel((0, y)) for y in (0, 3)] == [(255, 0, 0), (0, 0, 0)]


def test_enhanced_dicom_keeps_its_window_in_functional_groups(tmp_path):
    pixels = np.stack([np.tile(np.arange(0, 500, 100), (4, 1))] * 2).astype(np.uint16)
    window, rescale, shared = Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 1200, 400
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, 1000
    shared.FrameVOILUTSequence, shared.PixelValueTransformationSequence = [window], [rescale]
    write_dicom(tmp_path / "x.dcm", pixels, NumberOfFrames=2, SharedFunctionalGroupsSequence=[shared])
    assert gray(open_image(tmp_path / "x.dcm"))[0].tolist() == pytest.approx([0, 64, 128, 192, 255], abs=1)


def test_dicom_with_jpeg_inside_opens(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RAMP).save(buffer, "JPEG", quality=95)
    data = encapsulate([buffer.getvalue()])
    write_dicom(tmp_path / "x.dcm", RAMP, meta_syntax=JPEGBaseline8Bit, data=data)
    assert np.abs(gray(open_image(tmp_path / "x.dcm")) - RAMP).mean() < 4


def test_a_bare_dicom_data_set_without_a_file_header_opens(tmp_path):
    whole = write_dicom(tmp_path / "whole.dcm", RAMP).read_bytes()
    start = whole.index(b"\x08\x00\x16\x00UI")  # SOPClassUID, the first element after the file meta information
    (tmp_path / "bare.dcm").write_bytes(whole[start:])
    assert open_image(tmp_path / "bare.dcm").size == (64, 48)


def test_dicom_is_known_by_content_whatever_its_name(tmp_path):
    write_dicom(tmp_path / "IM0001", RAMP)
    assert open_image(tmp_path / "IM0001").size == (64, 48)


def test_dicom_compressed_beyond_the_installed_decoders_says_so(tmp_path):
    data = encapsulate([b"\xff\xd8 not really \xff\xd9"])
    write_dicom(tmp_path / "x.dcm", RAMP, meta_syntax=JPEGLSLossless, data=data)
    with pytest.raises(ImageError, match=r"compressed as JPEG-LS .*no decoder is installed"):
        open_image(tmp_path / "x.dcm")


def wide_png(path, width, height):
    """A valid PNG header of any size with next to no data behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((20_000, 2), "20000 x 2 pixels, over the limit"),
        ((2, 20_000), "over the limit"),
        ((9_000, 9_000), "over the limit"),
        ((20_000, 20_000), "over the limit"),
        ((0, 5), "."),
    ],
)
def test_images_beyond_the_limits_are_refused_before_decoding(tmp_path, size, words):
    wide_png(tmp_path / "x.png", *size)
    with pytest.raises(ImageError, match=words):
        open_image(tmp_path / "x.png")


def test_a_dicom_beyond_the_limits_is_refused(tmp_path):
    write_dicom(tmp_path / "x.dcm", RAMP, Columns=20_000)
    with pytest.raises(ImageError, match="over the limit"):
        open_image(tmp_path / "x.dcm")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.png", b"these are only words\n", "not a readable JPEG, PNG or DICOM"),
        ("x.dcm", b"these are only words\n" * 20, "DICOM"),
        ("x.png", b"", "empty"),
        ("x.png", b"\x89PNG\r\n\x1a\n", "JPEG, PNG|damaged"),
        ("x.gif", b"GIF89a" + bytes(50), "not a readable"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=words) as caught:
        open_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path, words in ((tmp_path / "no.png", "does not exist"), (tmp_path, "is a folder"), ("a\0b", "not a file name")):
        with pytest.raises(ImageError, match=words):
            open_image(path)


@pytest.mark.parametrize("kind", ["png", "jpg", "dcm"])
def test_a_cut_off_file_is_refused(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    path = tmp_path / f"x.{kind}"
    write_dicom(path, noise) if kind == "dcm" else Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "jpg", "dcm"])
def test_damaged_bytes_give_a_picture_or_an_image_error(tmp_path, kind):
    buffer, path = io.BytesIO(), tmp_path / f"x.{kind}"
    if kind == "dcm":
        whole = write_dicom(path, RAMP, WindowCenter=100, WindowWidth=50).read_bytes()
    else:
        Image.fromarray(RAMP).save(buffer, {"png": "PNG", "jpg": "JPEG"}[kind])
        whole = buffer.getvalue()
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 900), size=4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/hostname", "C:\\x.png", "..\\x.png", "\\\\host\\x", "", " ", "a\0b", "link"]
)
def test_no_image_name_leads_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "x.png").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "x.png")
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(ImageError):
        resolve_image(folder, name)


@pytest.mark.parametrize("name", ["a.png", "deep/er/a.png", "a..b.png", "./a.png", "résumé 1.png"])
def test_ordinary_image_names_stay_in_the_folder(tmp_path, name):
    assert resolve_image(tmp_path, name) == tmp_path / name
    (tmp_path / "alias").symlink_to(tmp_path, target_is_directory=True)
    assert resolve_image(tmp_path / "alias", name) == tmp_path / "alias" / name  # the folder itself may be a link


def test_real_radiographs_open():
    folder = SHARED / "data/vqa_rad/images"
    if not folder.is_dir():
        pytest.skip(f"the VQA-RAD images are not at {folder} (set MEDV_SHARED)")
    for path in sorted(folder.glob("*.jpg"))[:12]:
        image = open_image(path)
        assert image.mode == "RGB"
        assert min(image.size) >= 200
