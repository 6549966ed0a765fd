"""Image files as 8-bit RGB: JPEG, PNG (8 and 16 bits, palette, transparency) and DICOM, upright and windowed.

Files are untrusted: the size is checked before any pixel is decoded, every fault is one sentence in an `ImageError`, and a name
from a data file never leads out of its image folder. Pixel spacing is not corrected and nothing is anonymized.
"""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from medv.reading import DataError, in_a_sentence, open_regular

MAX_SIDE = 16_384
MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 30  # of a file, 1 GiB
# Errors that the decoders raise on damaged data.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


class ImageError(DataError):
    """One sentence about what is wrong with an image."""


@contextmanager
def _damage(words: str) -> Iterator[None]:
    """Turn what the decoders raise into an ImageError that begins with `words`."""
    try:
        yield
    except ImageError:
        raise
    except DAMAGE as error:
        raise ImageError(f"{words} is damaged or cut off: {error}") from None


def open_image(path: str | Path) -> Image.Image:
    """The image in a JPEG, PNG or DICOM file: RGB, 8 bits, upright.

    Transparent pixels show black. Grayscale of more than 8 bits is stretched between its 0.5 and 99.5 percentiles, or shown as
    its DICOM header says (`medv.data.dicom`). Raises ImageError for a file that is missing, damaged, of another kind, not
    regular, or over the limits of bytes and pixels.
    """
    path = Path(path)
    try:
        with open_regular(path, largest=MAX_BYTES) as stream:
            head = stream.read(132)
            stream.seek(0)
            if not head:
                raise ImageError(f"{path} is empty (0 bytes)")
            if head[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom"):
                from medv.data.dicom import open_dicom

                return open_dicom(path, stream)
            with warnings.catch_warnings(), _damage(str(path)):
                warnings.simplefilter("ignore")  # the limit here is stricter than Pillow's; damaged EXIF is handled below
                try:
                    image = Image.open(stream, formats=("JPEG", "PNG"))
                except UnidentifiedImageError:
                    kinds = "JPEG, PNG or DICOM file"
                    raise ImageError(f"{path} is not a readable {kinds}, whatever its name says") from None
                except Image.DecompressionBombError:
                    raise ImageError(f"{path} is far over the limit of {MAX_PIXELS} pixels: scale it down") from None
                check_size(path, *image.size)
                image.load()
                return _as_rgb(_upright(image))
    except DataError as error:
        raise ImageError(str(error)) from None


def as_picture(image: Image.Image) -> Image.Image:
    """An image in memory as `open_image` gives that of a file: RGB, 8 bits, upright; the same object if it is so already.

    Raises ImageError for any other type, and for an image that is damaged or too large.
    """
    if not isinstance(image, Image.Image):
        raise ImageError(
            f"an image is given as {type(image).__name__}: give a PIL image, as medv.data.images.open_image reads it from a "
            "file and PIL.Image.fromarray makes it of an array"
        )
    check_size("the image", *image.size)
    with _damage("an image in memory"):
        image.load()
        return _as_rgb(_upright(image))


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


def check_size(path: Path | str, width: int, height: int) -> None:
    """Raises ImageError for an image without pixels or with too many."""
    if width < 1 or height < 1:
        raise ImageError(f"{path} has no pixels ({width} x {height})")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(
            f"{path} is {width} x {height} pixels, over the limit of {MAX_SIDE} a side and {MAX_PIXELS} in all: scale it down"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image
    except DAMAGE:
        return image  # broken EXIF is common and says nothing about the pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N", "F"):
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
