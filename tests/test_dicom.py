"""DICOM as its header says: palettes, tables, windows, signs and frames; what is too large is refused before it is inflated."""

import io
import os
import time
import zlib

import numpy as np
import pydicom
import pytest
from dicom_files import RAMP, gray, write_dicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGExtended12Bit, RLELossless
from reference import FOLDER

from medv.data.images import ImageError, open_image

FAULTS = FOLDER.parent / "faults/inputs"
STEPS = np.array([[0, 500, 1000, 2000, 3000, 4095]] * 2, np.uint16)


def row(path):
    return gray(open_image(path))[0].tolist()


def table(entries, first=0, bits=16, data=None):
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item.add_new(0x00283006, "OW", np.asarray(entries, "<u2").tobytes() if data is None else data)
    return item


def palette(path, pixels, tables, bits, *, first=0, segmented=False, word="<u2", **fields):
    for color, entries in zip(("Red", "Green", "Blue"), tables, strict=True):
        fields[f"{color}PaletteColorLookupTableDescriptor"] = [256 if segmented else len(entries), first, bits]
        name = f"{'Segmented' if segmented else ''}{color}PaletteColorLookupTableData"
        fields[name] = np.asarray(entries, word).tobytes()
    return write_dicom(path, pixels, PhotometricInterpretation="PALETTE COLOR", **fields)


@pytest.mark.parametrize("name", ["palette16.dcm", "palette8.dcm"])
def test_palettes_of_both_depths_give_the_same_picture(name):
    if not FAULTS.is_dir():
        pytest.skip(f"the inputs are not at {FAULTS}")
    image = open_image(FAULTS / name)
    assert [image.getpixel((x, 1)) for x in range(4)] == [(0, 0, 0), (64, 32, 16), (128,) * 3, (255,) * 3]


def test_the_voi_table_of_a_header_is_applied():
    if not FAULTS.is_dir():
        pytest.skip(f"the inputs are not at {FAULTS}")
    assert row(FAULTS / "voilut.dcm") == [0, 0, 1, 15, 73, 255]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_scales_by_the_bits_of_its_entries_not_of_its_pixels(tmp_path, bits):
    top = 2**bits - 1
    ramp = np.rint(np.linspace(0, top, 300)).astype(int)  # more entries than eight bits count
    pixels = np.array([[0, 100, 200, 256, 299, 65535]], np.uint16)
    palette(tmp_path / "x.dcm", pixels, [ramp, ramp // 2, ramp * 0], bits)
    red, green, blue = np.asarray(open_image(tmp_path / "x.dcm"))[0].T.astype(int)
    wanted = np.rint(255 * np.array([0, 100, 200, 256, 299, 299]) / 299)
    assert np.abs(red - wanted).max() <= 1 and np.abs(green - wanted / 2).max() <= 1 and not blue.any()


def test_a_palette_of_eight_bits_may_lie_in_words_or_bytes_and_begin_anywhere(tmp_path):
    entries, pixels = [0, 64, 128, 255], np.array([[0, 10, 11, 12, 13, 99]], np.uint8)
    for word in ("<u2", "u1"):
        palette(tmp_path / f"{word[-2:]}.dcm", pixels, [entries] * 3, 8, first=10, word=word)
        assert row(tmp_path / f"{word[-2:]}.dcm") == [0, 0, 64, 128, 255, 255]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_segmented_palette_is_expanded(tmp_path, bits):
    top = 2**bits - 1
    segments = [0, 1, 0, 1, 255, top]  # one entry 0, then a line of 255 entries to the top
    pixels = np.array([[0, 51, 102, 255]], np.uint8)
    path = palette(tmp_path / "x.dcm", pixels, [segments] * 3, bits, segmented=True, word="<u2" if bits == 16 else "u1")
    assert row(path) == pytest.approx([0, 51, 102, 255], abs=1)


@pytest.mark.parametrize(("bits", "stored"), [(8, 16), (10, 12), (12, 16), (16, 16)])
def test_a_voi_table_of_every_depth_is_applied_before_a_window(tmp_path, bits, stored):
    entries = np.rint((np.arange(4096) / 4095) ** 2 * (2**bits - 1)).astype(int)
    fields = {"VOILUTSequence": [table(entries, bits=bits)], "WindowCenter": 10, "WindowWidth": 5, "BitsStored": stored}
    write_dicom(tmp_path / "x.dcm", STEPS, HighBit=stored - 1, **fields)
    wanted = [round(255 * (value / 4095) ** 2) for value in STEPS[0].tolist()]
    assert row(tmp_path / "x.dcm") == pytest.approx(wanted, abs=1)
    one = write_dicom(tmp_path / "1.dcm", STEPS, PhotometricInterpretation="MONOCHROME1", HighBit=stored - 1, **fields)
    assert row(one) == pytest.approx([255 - value for value in wanted], abs=1)


def test_a_voi_table_maps_what_the_rescale_gives_and_clamps_at_its_ends(tmp_path):
    pixels = np.array([[0, 24, 1024, 1124, 3000]], np.uint16)
    for first in (-1000, 64536):  # signed, and the same bits read as unsigned
        item = table(np.linspace(0, 65535, 1101).astype(int), first=first % 65536)
        fields = {"RescaleSlope": 1, "RescaleIntercept": -1024, "VOILUTSequence": [item]}
        write_dicom(tmp_path / "x.dcm", pixels, **fields)
        assert row(tmp_path / "x.dcm") == pytest.approx([0, 0, 232, 255, 255], abs=1)


def test_a_modality_table_comes_before_the_window(tmp_path):
    entries = np.arange(256)[::-1] * 4  # a film digitizer's densities
    fields = {"WindowCenter": 512, "WindowWidth": 1024, "ModalityLUTSequence": [table(entries, bits=16)]}
    write_dicom(tmp_path / "x.dcm", np.array([[0, 64, 128, 255]], np.uint8), **fields)
    assert row(tmp_path / "x.dcm") == pytest.approx([255, 191, 127, 0], abs=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"WindowCenter": 100, "WindowWidth": 1},
        {"WindowCenter": 100, "WindowWidth": 2},
        {"WindowCenter": [60, 500], "WindowWidth": [200, 3]},
        {"WindowCenter": 100, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 100, "WindowWidth": 80, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": -900.5, "WindowWidth": 300, "RescaleSlope": 2, "RescaleIntercept": -1024},
        {"VOILUTSequence": [table(np.arange(300) * 200)], "WindowCenter": 3, "WindowWidth": 2},
        {"ModalityLUTSequence": [table(np.arange(300) * 2)], "WindowCenter": 300, "WindowWidth": 400},
    ],
)
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_grayscale_is_what_pydicom_makes_of_it(tmp_path, fields, dtype):
    pixels = np.arange(0, 300, dtype=dtype).reshape(15, 20)
    data = pydicom.dcmread(write_dicom(tmp_path / "x.dcm", pixels, **fields))
    shown = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data).astype(float)
    if "VOILUTSequence" in fields:
        low, high = 0, 65535
    else:
        ends = np.array([-32768, 32767] if dtype == np.int16 else [0, 65535], float)
        slope, intercept = (fields.get(name, default) for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
        low, high = (0, 65535) if "ModalityLUTSequence" in fields else ends * slope + intercept
    wanted = np.rint((shown - low) / (high - low) * 255)
    assert np.abs(gray(open_image(tmp_path / "x.dcm")) - wanted).max() <= 1


def test_unused_bits_are_not_seen_and_signs_are(tmp_path):
    pixels = np.array([[0, 1000, 2000, 4095]], np.uint16) | 0xF000  # an overlay in the upper bits
    fields = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 2048, "WindowWidth": 4096}
    assert row(write_dicom(tmp_path / "x.dcm", pixels, **fields)) == pytest.approx([0, 62, 125, 255], abs=1)
    signed = np.array([[-2048, -1, 0, 2047]], np.int16) & 0x0FFF
    fields |= {"WindowCenter": 0, "PixelRepresentation": 1}
    assert row(write_dicom(tmp_path / "y.dcm", signed, **fields)) == pytest.approx([0, 127, 127, 255], abs=1)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(tmp_path, kind):
    pixels = np.arange(1000, 1400, dtype=np.uint16).reshape(20, 20)
    pixels[0], pixels[1] = 0, 5
    fields = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 5, "PhotometricInterpretation": kind}
    seen = gray(open_image(write_dicom(tmp_path / "x.dcm", pixels, **fields)))
    assert not seen[:2].any() and seen[2:].min() == 0 and seen[2:].max() == 255


@pytest.mark.parametrize(("planar", "kind"), [(0, "RGB"), (1, "RGB"), (0, "YBR_FULL"), (1, "YBR_FULL")])
def test_colors_keep_their_order_and_space(tmp_path, planar, kind):
    colors = np.array([[[200, 30, 60], [10, 220, 90]]], np.uint8)
    pixels = np.asarray(Image.fromarray(colors).convert("YCbCr")) if kind == "YBR_FULL" else colors
    data = (np.moveaxis(pixels, -1, 0) if planar else pixels).tobytes()
    fields = {"SamplesPerPixel": 3, "PhotometricInterpretation": kind, "PlanarConfiguration": planar}
    image = open_image(write_dicom(tmp_path / "x.dcm", pixels, data=data, **fields))
    assert np.abs(np.asarray(image).astype(int) - colors).max() <= 2


def test_colors_of_sixteen_bits_are_scaled_by_the_bits_that_are_stored(tmp_path):
    pixels = np.array([[[0, 2048, 4095]]], np.uint16)
    fields = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    image = open_image(write_dicom(tmp_path / "x.dcm", pixels, BitsStored=12, HighBit=11, **fields))
    assert image.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"PhotometricInterpretation": "HSV", "SamplesPerPixel": 3, "PlanarConfiguration": 0}, "HSV"),
        ({"PhotometricInterpretation": "SOMETHING"}, "SOMETHING"),
        ({"VOILUTFunction": "CUBIC", "WindowCenter": 4, "WindowWidth": 5}, "CUBIC"),
        ({"VOILUTSequence": [table([1, 2, 3], data=b"\0" * 4)]}, "."),
        ({"VOILUTSequence": [table([1, 2, 3], bits=70)]}, "70 bits"),
        ({"NumberOfFrames": 1_000_000}, "over the limit"),
        ({"NumberOfFrames": -3}, "over the limit"),
        ({"Rows": 16_000, "Columns": 16_000}, "over the limit"),
    ],
)
def test_what_cannot_be_shown_rightly_is_refused_in_one_sentence(tmp_path, fields, words):
    pixels = np.zeros((64, 64, 3) if fields.get("SamplesPerPixel") == 3 else (64, 64), np.uint8)
    with pytest.raises(ImageError, match=words) as caught:
        open_image(write_dicom(tmp_path / "x.dcm", pixels, **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("preamble", [True, False])
def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path, preamble):
    path = write_dicom(tmp_path / "x.dcm", RAMP, meta_syntax=DeflatedExplicitVRLittleEndian)
    assert open_image(path).size == (64, 48)
    whole = path.read_bytes()
    end = 144 + int.from_bytes(whole[140:144], "little")  # the meta information, not deflated
    engine = zlib.compressobj(9, wbits=-15)
    data = zlib.decompressobj(-15).decompress(whole[end:])
    bomb = engine.compress(data)
    for _ in range(40):
        bomb += engine.compress(bytes(8 << 20))
    path.write_bytes((whole[:end] if preamble else whole[132:end]) + bomb + engine.flush())
    assert path.stat().st_size < 500_000
    started = time.process_time()
    with pytest.raises(ImageError, match="inflates to more than 256000000 bytes"):
        open_image(path)
    assert time.process_time() - started < 10


def test_a_jpeg_larger_than_its_header_says_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (3000, 2000)).save(buffer, "JPEG")
    write_dicom(tmp_path / "x.dcm", RAMP, meta_syntax=JPEGBaseline8Bit, data=encapsulate([buffer.getvalue()]))
    with pytest.raises(ImageError, match="the JPEG in it has 3000 x 2000"):
        open_image(tmp_path / "x.dcm")


@pytest.mark.parametrize("syntax", [JPEGExtended12Bit, JPEGBaseline8Bit, RLELossless])
def test_the_reason_and_the_mend_of_a_decoder_that_failed_are_told_whole(tmp_path, syntax):
    write_dicom(tmp_path / "x.dcm", RAMP, meta_syntax=syntax, data=encapsulate([b"\xff\xd8\xff\xc1 nothing \xff\xd9"]))
    with pytest.raises(ImageError, match=r"unsupported DICOM file: .*pylibjpeg\[all\]") as caught:
        open_image(tmp_path / "x.dcm")
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(":")


@pytest.mark.parametrize("name", ["x.png", "x.dcm"])
def test_a_pipe_or_a_device_is_no_image(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / f"zero-{name}").symlink_to("/dev/zero")
    for path, words in ((tmp_path / name, "a pipe"), (tmp_path / f"zero-{name}", "a device")):
        with pytest.raises(ImageError, match=words):
            open_image(path)
