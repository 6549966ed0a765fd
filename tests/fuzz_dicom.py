"""The DICOM cases of `fuzz`: files with elements that are odd, missing or at odds with one another."""

import io
import math
import warnings

import numpy as np
import pydicom
from fuzz_cases import SHORT, case, damaged
from hypothesis import assume
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, AllTransferSyntaxes, ExplicitVRLittleEndian

_TAGS = {
    "Rows": ("US", (0, 1, 8, 16, 65535)),
    "Columns": ("US", (0, 1, 8, 16, 65535)),
    "BitsAllocated": ("US", (0, 1, 7, 8, 16, 24, 32, 64, 65535)),
    "BitsStored": ("US", (0, 1, 8, 12, 16, 17, 64)),
    "HighBit": ("US", (0, 7, 11, 15, 40)),
    "PixelRepresentation": ("US", (0, 1, 2)),
    "SamplesPerPixel": ("US", (0, 1, 2, 3, 4, 100)),
    "PlanarConfiguration": ("US", (0, 1, 2)),
    "PhotometricInterpretation": (
        "CS",
        ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "PALETTE COLOR", "ARGB", "", "\x1b[31m"),
    ),
    "NumberOfFrames": ("IS", ("0", "1", "2", "-1", "99999999", "abc", "")),
    "WindowCenter": ("DS", ("0", "40", "-1e30", "nan", "abc", "", "40\\80")),
    "WindowWidth": ("DS", ("0", "1", "-5", "1e-30", "inf", "", "400\\80\\1")),
    "RescaleSlope": ("DS", ("0", "1", "-2", "1e300", "nan", "x", "")),
    "RescaleIntercept": ("DS", ("0", "-1024", "1e300", "")),
    "VOILUTFunction": ("CS", ("LINEAR", "SIGMOID", "LINEAR_EXACT", "x", "")),
    "PixelAspectRatio": ("IS", ("1\\1", "0\\0", "-1\\3", "1")),
    "SpecificCharacterSet": ("CS", ("ISO_IR 100", "\\ISO 2022 IR 87", "nonsense", "\x1b[31m", "")),
    "SmallestImagePixelValue": ("US", (0, 65535)),
    "PixelPaddingValue": ("US", (0, 255)),
}


@st.composite
def dicom(draw):
    """DICOM files of `medv ask`."""
    rng = np.random.default_rng(draw(st.integers(0, 3)))
    bits, planes, side = draw(st.sampled_from((8, 16, 16, 32))), draw(st.sampled_from((1, 1, 1, 3))), 16
    ds = Dataset()
    ds.Rows = ds.Columns = side
    ds.BitsAllocated = ds.BitsStored = bits
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = bits - 1, 0, planes
    ds.PhotometricInterpretation = "RGB" if planes == 3 else "MONOCHROME2"
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PatientName = (UID("1.2.840.10008.5.1.4.1.1.7"), UID("1.2.3"), "OT", "a")
    if planes == 3:
        ds.PlanarConfiguration = 0
    pixels = rng.integers(0, 256, side * side * planes * bits // 8, dtype=np.uint8).tobytes()
    if draw(st.integers(0, 3)) == 0:
        ds.PhotometricInterpretation = "PALETTE COLOR"
        entries = draw(st.sampled_from(([256, 0, 16], [256, 0, 8], [0, 0, 16], [2, 65535, 16], [256, 0, 0], [256], [1, 0, 99])))
        for color in ("Red", "Green", "Blue"):
            ds.add_new(f"{color}PaletteColorLookupTableDescriptor", "US", entries)
            ds.add_new(
                f"{color}PaletteColorLookupTableData",
                "OW",
                draw(st.sampled_from((bytes(512), bytes(range(256)) * 2, b"", b"\0\0"))),
            )
    for sequence, data_vr in (("VOILUTSequence", "US"), ("ModalityLUTSequence", "US")):
        if draw(st.integers(0, 5)) == 0:
            item = Dataset()
            item.add_new(
                "LUTDescriptor",
                "US",
                draw(st.sampled_from(([6, 0, 8], [0, 0, 16], [65535, 0, 16], [4, 9, 16], [4, 0, 99], [4]))),
            )
            item.add_new("LUTData", data_vr, draw(st.lists(st.integers(0, 65535), max_size=8)))
            ds.add_new(sequence, "SQ", draw(st.sampled_from(([item], [], [item, item], [Dataset()]))))
    wrong = {name: draw(st.sampled_from(_TAGS[name][1])) for name in draw(st.lists(st.sampled_from(sorted(_TAGS)), max_size=3))}
    gone = draw(st.lists(st.sampled_from(sorted(_TAGS)), max_size=1))
    size = draw(st.sampled_from((len(pixels),) * 5 + (0, 1, len(pixels) - 2, len(pixels) * 2)))
    ds.add_new("PixelData", "OW" if bits > 8 else "OB", (pixels * 2)[:size])
    syntax = draw(st.sampled_from((ExplicitVRLittleEndian,) * 8 + tuple(AllTransferSyntaxes)))
    return case({"x.dcm": draw(damaged(_written(ds, wrong, gone, syntax)))}, "ask", "{folder}/x.dcm", "What is it?", *SHORT)


def _written(ds, wrong, gone, syntax):
    """The file; `syntax` is what its header says, whatever the data are."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        for name, value in wrong.items():
            vr = _TAGS[name][0]
            ds.add_new(name, "LO" if vr in ("DS", "IS") and not _number(value) else vr, value)
        for name in gone:
            if name in ds:
                del ds[name]
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (ds.SOPClassUID, ds.SOPInstanceUID)
        stream = io.BytesIO()
        try:
            pydicom.dcmwrite(stream, ds, enforce_file_format=True)
        except (ValueError, TypeError, AttributeError, OverflowError):
            assume(False)  # a value that cannot be written
    written = stream.getvalue()
    uid = str(ExplicitVRLittleEndian).encode() + b"\0"
    told = str(syntax).encode()
    return written.replace(uid, told[: len(uid)].ljust(len(uid), b"\0"), 1) if len(told) <= len(uid) else written


def _number(value):
    try:
        return all(math.isfinite(float(part)) for part in value.split("\\"))
    except ValueError:
        return False
