"""DICOM files as 8-bit RGB images, displayed as their headers say.

Grayscale goes through the modality table or rescale (PS3.3 C.11.1) and then the VOI table, else the first window (C.11.2);
without either it is stretched between its percentiles. MONOCHROME1 is inverted at the end, and padding is black. Colors go
through their palette (C.7.6.3.1.5). Of several frames the middle one is shown. Sizes are checked before anything is inflated or
decoded.
"""

import io
import math
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000TransferSyntaxes, JPEGTransferSyntaxes

from medv.data.images import DAMAGE, MAX_PIXELS, ImageError, check_size, gray_to_rgb, stretch

MAX_VALUES = 16 * MAX_PIXELS  # in all frames and samples of a file
MAX_INFLATED = 4 * MAX_PIXELS  # bytes of a deflated file
_PIECE = 1 << 20
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420", "YBR_PARTIAL_422")
_DECODERS = "pip install 'pylibjpeg[all]', or save it uncompressed"


def open_dicom(path: Path, stream: BinaryIO) -> Image.Image:
    """The image in a DICOM file that is open at its beginning: RGB, 8 bits. Raises ImageError."""
    compressed = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_inflated(path, stream)
            data = pydicom.dcmread(stream, force=True)
            if "PixelData" not in data:
                raise ImageError(f"{path} is a DICOM file without an image in it, or not a DICOM file at all")
            if "TransferSyntaxUID" not in data.file_meta:  # a bare data set, as old devices write
                data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            syntax = data.file_meta.TransferSyntaxUID
            compressed = syntax.is_compressed
            frames = int(data.get("NumberOfFrames") or 1)
            shown = (frames - 1) // 2
            _check_values(path, data, frames, shown)
            if compressed and not get_decoder(syntax).is_available:
                raise ImageError(f"{path} is compressed as {syntax.name}, for which no decoder is installed: {_DECODERS}")
            return _picture(data, shown)
    except ImageError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        mend = f": {_DECODERS}" if compressed else ""
        raise ImageError(f"{path} is a damaged or unsupported DICOM file: {reason}{mend}") from None


def _check_inflated(path: Path, stream: BinaryIO) -> None:
    """Raises ImageError for a deflated data set over MAX_INFLATED bytes; pydicom would inflate it whole."""
    stream.seek(132 if stream.read(132)[128:] == b"DICM" else 0)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        engine, size, piece = zlib.decompressobj(-zlib.MAX_WBITS), 0, stream.read(_PIECE)
        while piece and not engine.eof:
            size += len(engine.decompress(piece, _PIECE))
            piece = engine.unconsumed_tail or stream.read(_PIECE)
            if size > MAX_INFLATED:
                raise ImageError(
                    f"{path} inflates to more than {MAX_INFLATED} bytes: it is no picture, or save it uncompressed"
                )
    stream.seek(0)


def _check_values(path: Path, data: Dataset, frames: int, shown: int) -> None:
    """Raises ImageError where the header, or the JPEG below it, announces too many pixels, frames or samples."""
    width, height, samples = int(data.Columns), int(data.Rows), int(data.SamplesPerPixel)
    check_size(path, width, height)
    if frames < 1 or not 1 <= samples <= 4 or width * height * frames * samples > MAX_VALUES:
        raise ImageError(
            f"{path} has {frames} frames of {width} x {height} pixels with {samples} samples, over the limit of "
            f"{MAX_VALUES} values: save the frame to be asked about alone"
        )
    if data.file_meta.TransferSyntaxUID in (*JPEGTransferSyntaxes, *JPEG2000TransferSyntaxes):
        coded = io.BytesIO(get_frame(data.PixelData, shown, number_of_frames=frames))
        try:
            size = Image.open(coded, formats=("JPEG", "JPEG2000")).size
        except OSError:  # a kind of JPEG that Pillow cannot read: another decoder may
            return
        if size != (width, height):
            raise ImageError(
                f"{path} says {width} x {height} pixels, but the JPEG in it has {size[0]} x {size[1]}: it is damaged"
            )


def _picture(data: Dataset, frame: int) -> Image.Image:
    """One frame as its header says."""
    stored, kind = pixel_array(data, index=frame), data.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        return _colors(*_palette(stored, data))
    if stored.ndim == 3:
        if kind not in _COLORS:
            raise ValueError(f"its colors are of the kind {kind!r}")
        return _colors(stored, int(data.BitsStored))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"its pixels are of the kind {kind!r}")
    values = _modality(stored, data, frame)
    padding = _padding(stored, data)
    unit = _voi(values, data, frame)
    if unit is None:
        unit = np.asarray(stretch(values, ~padding).convert("L")) / 255.0
    if kind == "MONOCHROME1":
        unit = 1.0 - unit
    return gray_to_rgb(np.where(padding, 0.0, unit))


def _colors(values: np.ndarray, bits: int) -> Image.Image:
    """RGB of colors [height, width, 3 or 4] with so many bits; the fourth channel, opacity, is dropped."""
    top = _top(values, bits)
    return Image.fromarray(np.rint(values[..., :3] / top * 255).clip(0, 255).astype(np.uint8))


def _top(values: np.ndarray, bits: int) -> float:
    """The value of full brightness: the largest of the bits, or of the data type where a value exceeds them."""
    top = 2**bits - 1
    return float(top if values.size and values.max() <= top else np.iinfo(values.dtype).max)


def _palette(stored: np.ndarray, data: Dataset) -> tuple[np.ndarray, int]:
    """Colors [height, width, 3] and the bits of the palette's entries."""
    entries, _, bits = _descriptor(data.RedPaletteColorLookupTableDescriptor)
    if "RedPaletteColorLookupTableData" in data:
        names = [f"{color}PaletteColorLookupTable" for color in ("Red", "Green", "Blue")]
        tables = [_look_up(stored, data, data[f"{name}Descriptor"].value, data[f"{name}Data"].value) for name in names]
        return np.stack(tables, axis=-1), bits
    if bits == 8 and entries > 256:  # pydicom would count the entries in 8 bits
        raise ValueError("a segmented palette of 8 bits has more than 256 entries")
    first = _descriptor(data.RedPaletteColorLookupTableDescriptor)[1]
    return apply_color_lut(np.clip(stored, first, first + entries - 1), data), bits


def _descriptor(values: Any) -> tuple[int, int, int]:
    """Entries (0 means 65536), first value mapped and bits of a lookup table."""
    entries, first, bits = (int(value) for value in values)
    if not 8 <= bits <= 16:
        raise ValueError(f"a lookup table has entries of {bits} bits")
    return (entries & 0xFFFF) or 1 << 16, first, bits


def _look_up(values: np.ndarray, data: Dataset, descriptor: Any, table: Any) -> np.ndarray:
    """The entries of a lookup table for `values`, clipped to its ends; pydicom loses those beyond 255 of an 8-bit table."""
    entries, first, bits = _descriptor(descriptor)
    if first >= 1 << 15 and values.min() < 0:  # written as unsigned, though the values are not
        first -= 1 << 16
    if isinstance(table, bytes):
        little = data.file_meta.TransferSyntaxUID.is_little_endian
        wide = np.dtype("<u2" if little else ">u2")
        packed = bits == 8 and len(table) <= entries + 1  # a byte each, and one that makes the length even
        table = np.frombuffer(table, np.uint8) if packed else np.frombuffer(table[: len(table) // 2 * 2], wide)
    table = np.asarray(table).astype(np.uint16)[:entries]
    if len(table) < entries:
        raise ValueError(f"a lookup table has {len(table)} entries instead of {entries}")
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)]


def _modality(stored: np.ndarray, data: Dataset, frame: int) -> np.ndarray:
    """The stored values in their unit (Hounsfield units, for example), as float64."""
    if table := data.get("ModalityLUTSequence"):
        return _look_up(stored, data, table[0].LUTDescriptor, table[0].LUTData).astype(np.float64)
    slope, intercept = (_number(data, frame, name) for name in ("RescaleSlope", "RescaleIntercept"))
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ValueError(f"its rescale is {slope} and {intercept}")
    return stored * slope + intercept


def _padding(stored: np.ndarray, data: Dataset) -> np.ndarray:
    """bool [height, width]: the pixels outside the acquired area."""
    value = data.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = data.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _found(data: Dataset, frame: int, keyword: str) -> Any:
    """The value of a keyword, the first of several, in the header or (enhanced multi-frame) its functional groups; or None."""
    places = [data]
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        if len(data.get(groups) or ()) > index:
            for name in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
                places += list(data[groups][index].get(name) or ())[:1]
    for place in places:
        value = place.get(keyword)
        if value is not None and value != "":
            several = hasattr(value, "__getitem__") and not isinstance(value, str)
            if not several or len(value):
                return value[0] if several else value
    return None


def _number(data: Dataset, frame: int, keyword: str) -> float | None:
    value = _found(data, frame, keyword)
    return None if value is None else float(value)


def _voi(values: np.ndarray, data: Dataset, frame: int) -> np.ndarray | None:
    """Brightness in [0, 1] by the VOI table, else the window; None where the header has no usable one."""
    table = _found(data, frame, "VOILUTSequence")
    if table is not None:
        shown = _look_up(values, data, table.LUTDescriptor, table.LUTData)
        return shown / _top(shown, _descriptor(table.LUTDescriptor)[2])
    center, width = (_number(data, frame, name) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None or not (math.isfinite(center) and math.isfinite(width)):
        return None
    function = str(_found(data, frame, "VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise ValueError(f"its VOI LUT function is {function!r}")
    if width < 1 if function == "LINEAR" else width <= 0:
        return None
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    return (values - center) / width + 0.5 if width > 0 else (values > center).astype(np.float64)
