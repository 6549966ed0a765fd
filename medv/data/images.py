"""Image files to 8-bit RGB pictures: JPEG, PNG (8 and 16 bits, palette, transparency) and DICOM, upright and windowed.

Files are untrusted: the size is checked before any pixel is decoded, and whatever is wrong with a file is one sentence in an
`ImageError`. A name from a data file never leads out of its image folder. This module knows no data set and no model; it does
not correct for pixel spacing and does not anonymize.
"""

import math
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medv.reading import DataError, in_a_sentence, open_regular

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_SIDE = 16_384
MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 30  # of a file, 1 GiB
_FORMATS = ("JPEG", "PNG")
_DICOM_SUFFIXES = (".dcm", ".dicom")
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# What the decoders raise on damaged data, besides their own errors.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)


class ImageError(ValueError):
    """One sentence about what is wrong with an image file."""


def open_image(path: str | Path, *, max_side: int = MAX_SIDE, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a JPEG, PNG or DICOM file: RGB, 8 bits, upright.

    Transparent pixels show black. Grayscale of more than 8 bits is stretched between its 0.5 and 99.5 percentiles, or windowed
    as its DICOM header says; of several frames the middle one is taken. Raises ImageError for a file that is missing, damaged,
    of another kind, or larger than `max_side` pixels in a direction or `max_pixels` in all.
    """
    path = Path(path)
    try:
        file = open_regular(path, largest=MAX_BYTES)
    except OSError as error:
        raise ImageError(in_a_sentence(error)) from None
    except DataError as error:
        raise ImageError(str(error)) from None
    except ValueError:  # a zero byte in it
        raise ImageError(f"{str(path)!r} is not a file name") from None
    with file:  # read to the end through this one opening: the name may mean another file by then
        try:
            head = file.read(132)
            file.seek(0)
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}") from None
        if not head:
            raise ImageError(f"{path} is empty (0 bytes)")
        dicom = head[128:] == b"DICM" or path.suffix.lower() in _DICOM_SUFFIXES
        return (_open_dicom if dicom else _open_picture)(path, file, max_side, max_pixels)


@dataclass(frozen=True)
class ImageFolder(os.PathLike):
    """A folder of images whose links may lead into other named folders: the hub's cache, the store of DVC or git-annex.

    It stands wherever the path of an image folder does. Raises ValueError for a root that is no folder.
    """

    path: Path
    roots: tuple[Path, ...] = ()

    def __post_init__(self):
        absent = next((root for root in self.roots if not root.is_dir()), None)
        if absent is not None:
            raise ImageError(f"the image root {absent} is not a folder: give the one that the links lead into")

    def __fspath__(self) -> str:
        return str(self.path)


def resolve_image(folder: str | os.PathLike, name: str) -> Path:
    """The path of image `name` inside `folder`, which need not exist.

    Raises ImageError where the name leads out of the folder: an absolute path, "..", or a symbolic link to the outside, but
    for links into the roots of an `ImageFolder`.
    """
    foreign = PureWindowsPath(name)  # takes both / and \ for separators
    if not name.strip() or "\0" in name:
        raise ImageError(f"{name!r} is not an image name")
    if foreign.anchor or ".." in foreign.parts:
        raise ImageError(f"image {name!r} leads out of the image folder: names must be relative, without '..'")
    path = Path(folder) / name
    allowed = (Path(folder), *(folder.roots if isinstance(folder, ImageFolder) else ()))
    try:
        target = path.resolve()
        inside = any(target.is_relative_to(root.resolve()) for root in allowed)
    except OSError as error:
        raise ImageError(in_a_sentence(error)) from None
    except RuntimeError:
        raise ImageError(f"image {name!r} is a link that leads back to itself") from None
    if not inside:
        raise ImageError(
            f"image {name!r} is a link that leads out of the image folder {Path(folder)}, to {target}: "
            "allow the folder that it leads into with --image-root"
        )
    return path


def _check_size(path: Path, width: int, height: int, max_side: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{path} has no pixels ({width} x {height})")
    if max(width, height) > max_side or width * height > max_pixels:
        raise ImageError(
            f"{path} is {width} x {height} pixels, over the limit of {max_side} a side and {max_pixels} in all: scale it down"
        )


def _open_picture(path: Path, file: BinaryIO, max_side: int, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # our own limit is stricter than Pillow's warning; damaged EXIF is handled below
            with Image.open(file, formats=_FORMATS) as image:
                _check_size(path, *image.size, max_side, max_pixels)
                image.load()
                return _as_rgb(_upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not a readable JPEG, PNG or DICOM file, whatever its name says") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} is far over the limit of {max_pixels} pixels: scale it down") from None
    except _DAMAGE as error:
        raise ImageError(f"{path} is damaged or cut off: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE:
        return image  # broken EXIF is common in the wild and says nothing about the pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_MODES:
        return _stretch(np.asarray(image, dtype=np.float64))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def _stretch(gray: np.ndarray, valid: np.ndarray | None = None) -> Image.Image:
    """Grayscale [height, width] of any range between its percentiles; pixels that are not `valid` do not count."""
    counted = gray if valid is None or not valid.any() else gray[valid]
    low, high = np.percentile(counted, [0.5, 99.5])
    if high <= low:  # nearly constant: what little there is lies outside the percentiles
        low, high = counted.min(), counted.max()
    return _gray_to_rgb((gray - low) / (high - low) if high > low else np.zeros_like(gray))


def _gray_to_rgb(unit: np.ndarray) -> Image.Image:
    """Brightness [height, width] in [0, 1], clipped, to RGB."""
    return Image.fromarray(np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def _open_dicom(path: Path, file: BinaryIO, max_side: int, max_pixels: int) -> Image.Image:
    # Imported here because most runs never meet DICOM and pydicom takes a noticeable part of a second to load.
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(file, force=True)
            if "PixelData" not in data:
                raise ImageError(f"{path} is a DICOM file without an image in it, or not a DICOM file at all")
            _check_size(path, int(data.Columns), int(data.Rows), max_side, max_pixels)
            _check_decoder(path, data)
            return _dicom_frame(data)
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError(f"{path} is a damaged or unsupported DICOM file: {error}".splitlines()[0]) from None


def _check_decoder(path: Path, data: "Dataset") -> None:
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRLittleEndian

    if "TransferSyntaxUID" not in data.file_meta:  # a bare data set, as old devices write
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not get_decoder(syntax).is_available:
        raise ImageError(
            f"{path} is compressed as {syntax.name}, for which no decoder is installed: "
            "pip install 'pylibjpeg[all]', or save it uncompressed"
        )


def _dicom_frame(data: "Dataset") -> Image.Image:
    """The middle frame, with the palette or the modality rescale, the window and MONOCHROME1 applied."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    frame = (int(data.get("NumberOfFrames") or 1) - 1) // 2
    stored = pixel_array(data, index=frame)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, data)
    if stored.ndim == 3:
        top = float(np.iinfo(stored.dtype).max if stored.dtype != np.uint16 else 2 ** int(data.BitsStored) - 1)
        return Image.fromarray(np.rint(stored / (top or 1) * 255).clip(0, 255).astype(np.uint8))
    slope = _functional(data, frame, "PixelValueTransformationSequence", "RescaleSlope")
    if "ModalityLUTSequence" in data:
        values = apply_modality_lut(stored, data).astype(np.float64)
    else:
        offset = _functional(data, frame, "PixelValueTransformationSequence", "RescaleIntercept")
        values = stored * (1.0 if slope is None else slope) + (offset or 0.0)
    unit = _window(values, data, frame)
    if unit is None:
        padding = data.get("PixelPaddingValue")
        unit = np.asarray(_stretch(values, None if padding is None else stored != padding).convert("L")) / 255.0
    return _gray_to_rgb(1.0 - unit if data.PhotometricInterpretation == "MONOCHROME1" else unit)


def _functional(data: "Dataset", frame: int, group: str, keyword: str) -> float | None:
    """A number of the header, or of its functional groups (enhanced multi-frame); the first where there are several."""
    places = [data]
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        if len(data.get(groups) or ()) > index:
            places += list(data[groups][index].get(group) or ())[:1]
    for place in places:
        value = place.get(keyword)
        if value is not None and value != "":
            return float(
                value if isinstance(value, (str, int, float)) or not hasattr(value, "__getitem__") else value[0]
            )
    return None


def _window(values: np.ndarray, data: "Dataset", frame: int) -> np.ndarray | None:
    """Brightness in [0, 1] under the header's window (DICOM PS3.3 C.11.2.1.2), or None if it has no usable one."""
    center = _functional(data, frame, "FrameVOILUTSequence", "WindowCenter")
    width = _functional(data, frame, "FrameVOILUTSequence", "WindowWidth")
    if center is None or width is None or not (math.isfinite(center) and math.isfinite(width)) or width <= 0:
        return None
    function = data.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    return (values - center) / width + 0.5 if width > 0 else (values > center).astype(np.float64)
