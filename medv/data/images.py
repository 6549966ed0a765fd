"""Image files to 8-bit RGB pictures: JPEG, PNG (8 and 16 bits, palette, transparency) and DICOM, upright and windowed.

Files are untrusted: the size is checked before any pixel is decoded, and whatever is wrong with a file is one sentence in an
`ImageError`. A name from a data file never leads out of its image folder. This module knows no data set and no model; it does
not correct for pixel spacing and does not anonymize.
"""

import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from medv.reading import DataError, in_a_sentence, open_regular

MAX_SIDE = 16_384
MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 30  # of a file, 1 GiB
_FORMATS = ("JPEG", "PNG")
_DICOM_SUFFIXES = (".dcm", ".dicom")
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# What the decoders raise on damaged data, besides their own errors.
DAMAGE = (
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
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """One sentence about what is wrong with an image file."""


def open_image(path: str | Path, *, max_side: int = MAX_SIDE, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a JPEG, PNG or DICOM file: RGB, 8 bits, upright.

    Transparent pixels show black. Grayscale of more than 8 bits is stretched between its 0.5 and 99.5 percentiles, or shown as
    its DICOM header says (`medv.data.dicom`). Raises ImageError for a file that is missing, damaged, of another kind, no
    regular file, or larger than `max_side` pixels in a direction or `max_pixels` in all.
    """
    path = Path(path)
    try:
        with open_regular(path, largest=MAX_BYTES) as stream:
            head = stream.read(132)
            stream.seek(0)
            if not head:
                raise ImageError(f"{path} is empty (0 bytes)")
            if head[128:] == b"DICM" or path.suffix.lower() in _DICOM_SUFFIXES:
                from medv.data.dicom import open_dicom

                return open_dicom(path, stream, max_side, max_pixels)
            return _open_picture(path, stream, max_side, max_pixels)
    except OSError as error:
        error.filename = path  # a failed read does not know it
        raise ImageError(in_a_sentence(error)) from None
    except ImageError:
        raise
    except DataError as error:
        raise ImageError(str(error)) from None
    except ValueError:  # a zero byte in it
        raise ImageError(f"{str(path)!r} is not a file name") from None


def as_picture(image: Image.Image) -> Image.Image:
    """A picture in memory as `open_image` gives that of a file: RGB, 8 bits, upright; one that is so already is returned.

    Raises ImageError for what is no PIL image, and for one that is damaged or too large.
    """
    if not isinstance(image, Image.Image):
        raise ImageError(
            f"an image is given as {type(image).__name__}: give a PIL image, as medv.data.images.open_image reads it from a "
            "file and PIL.Image.fromarray makes it of an array"
        )
    check_size("the image", *image.size, MAX_SIDE, MAX_PIXELS)
    try:
        image.load()
        return _as_rgb(_upright(image))
    except ImageError:
        raise
    except DAMAGE as error:
        raise ImageError(f"an image in memory is damaged or cut off: {error}") from None


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


def check_size(path: Path | str, width: int, height: int, max_side: int, max_pixels: int) -> None:
    """Raises ImageError for a picture without pixels or with too many."""
    if width < 1 or height < 1:
        raise ImageError(f"{path} has no pixels ({width} x {height})")
    if max(width, height) > max_side or width * height > max_pixels:
        raise ImageError(
            f"{path} is {width} x {height} pixels, over the limit of {max_side} a side and {max_pixels} in all: scale it down"
        )


def _open_picture(path: Path, stream: BinaryIO, max_side: int, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit is stricter than Pillow's warning; damaged EXIF is handled below
            with Image.open(stream, formats=_FORMATS) as image:
                check_size(path, *image.size, max_side, max_pixels)
                image.load()
                return _as_rgb(_upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not a readable JPEG, PNG or DICOM file, whatever its name says") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} is far over the limit of {max_pixels} pixels: scale it down") from None
    except DAMAGE as error:
        raise ImageError(f"{path} is damaged or cut off: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image
    except DAMAGE:
        return image  # broken EXIF is common in the wild and says nothing about the pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_MODES:
        return stretch(np.asarray(image, dtype=np.float64))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def stretch(gray: np.ndarray, valid: np.ndarray | None = None) -> Image.Image:
    """Grayscale [height, width] of any range between its percentiles; pixels that are not `valid` do not count."""
    if not np.isfinite(gray).all():
        raise ImageError("an image holds pixels that are not finite (NaN or infinity): it is damaged")
    counted = gray if valid is None or not valid.any() else gray[valid]
    low, high = np.percentile(counted, [0.5, 99.5])
    if high <= low:  # nearly constant: what little there is lies outside the percentiles
        low, high = counted.min(), counted.max()
    return gray_to_rgb((gray - low) / (high - low) if high > low else np.zeros_like(gray))


def gray_to_rgb(unit: np.ndarray) -> Image.Image:
    """Brightness [height, width] in [0, 1], clipped, to RGB."""
    return Image.fromarray(np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)).convert("RGB")
