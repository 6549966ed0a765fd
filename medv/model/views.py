"""From one picture to the square views that the vision tower looks at, and how many visual tokens they become.

Aspect modes (those of LLaVA-NeXT, LLaDA-V and LLaDA-MedV): "square" squashes the picture to one view; "pad" first makes it
square with gray; "anyres" cuts an enlarged picture into tiles of the tower's size, after a base view of the whole. Merge
types: "flat" leaves the views one after the other; "spatial" reads the tiles as one large picture, row by row;
"spatial_unpad" also drops the tokens of the black padding, shrinks what is too large and ends each row with a newline.
The arithmetic of all of it stands here once: `medv.model.merging` does to the features what a `Layout` says. Floats are
rounded where the reference rounds them, as one pixel decides about a row of tokens. It knows pictures and integers, no tensors.
"""

import math
from dataclasses import dataclass

from PIL import Image
from transformers.image_processing_utils import select_best_resolution

ASPECTS = ("square", "pad", "anyres")
MERGES = ("flat", "spatial", "spatial_unpad")
PAD_COLOR = (127, 127, 127)  # int(255 * 0.5): the mean of the tower's normalization
MOST = 1024  # sizes in a grid, and tiles of one image: the released models have 36 of each
ENLARGED = 1.1  # a grid is shrunk only where its side is more than 1.1 times that of `max_tiles` tiles


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of one image stand: the base view, then a grid of tile tokens, row by row.

    columns, rows: tiles (0 where there is only the base view). left, top: token columns cut off on the left and on the
    right, token rows cut off above and below. width, height: tokens of the grid after that, and after shrinking. newline: 1
    where a newline token ends each row; an image without tiles then has one row of width 0.
    """

    columns: int
    rows: int
    left: int
    top: int
    width: int
    height: int
    newline: int

    @property
    def views(self) -> int:
        """Square views that go through the vision tower, the base included."""
        return 1 + self.columns * self.rows

    def tokens(self, side: int) -> int:
        """Visual tokens of the image, with `side` tokens along the side of one view."""
        return side * side + self.height * (self.width + self.newline)


@dataclass(frozen=True)
class ViewPlan:
    """How pictures of any size become views and tokens.

    size: pixels along the side of a view. side: visual tokens along it. grid: the sizes [width, height] in pixels that
    "anyres" may enlarge a picture to. max_tiles: with "spatial_unpad", larger grids are shrunk to about the tokens of so many
    tiles (the N of anyres_max_N). Raises ValueError for settings that do not fit together.
    """

    size: int
    side: int
    aspect: str = "square"
    grid: tuple[tuple[int, int], ...] = ()
    max_tiles: int | None = None
    merge: str = "flat"

    def __post_init__(self):
        if self.aspect not in ASPECTS:
            raise ValueError(f"unknown image_aspect {self.aspect!r}: use one of {', '.join(ASPECTS)}")
        if self.merge not in MERGES:
            raise ValueError(f"unknown patch_merge {self.merge!r}: use one of {', '.join(MERGES)}")
        if self.max_tiles is not None and not 1 <= self.max_tiles <= MOST:
            raise ValueError(f"image_max_tiles is {self.max_tiles}: give a number from 1 to {MOST}, or None for no limit")
        if self.aspect != "anyres":
            return
        if not self.grid:
            raise ValueError("image_aspect 'anyres' needs image_grid: a list of [width, height] in pixels")
        if len(self.grid) > MOST:
            raise ValueError(f"image_grid holds {len(self.grid)} sizes, over the limit of {MOST}: leave some out")
        for pair in self.grid:
            if len(pair) != 2 or any(value < 1 or value % self.size for value in pair):
                raise ValueError(
                    f"image_grid holds {list(pair)}: give [width, height] in multiples of the tower's {self.size} pixels"
                )
            if (tiles := pair[0] // self.size * (pair[1] // self.size)) > MOST:
                raise ValueError(f"image_grid holds {list(pair)}, {tiles} tiles of one image: give sizes of at most {MOST}")

    def resolution(self, width: int, height: int) -> tuple[int, int]:
        """The size [width, height] of the grid that keeps most of the picture's pixels and, among equals, wastes least."""
        best = select_best_resolution((height, width), [(pair[1], pair[0]) for pair in self.grid])
        return best[1], best[0]

    def layout(self, width: int, height: int) -> Layout:
        """The layout of a picture of so many pixels."""
        if width < 1 or height < 1:
            raise ValueError(f"the image has {width} x {height} pixels: an image needs at least one")
        unpad = self.merge == "spatial_unpad"
        if self.aspect != "anyres":
            return Layout(0, 0, 0, 0, 0, int(unpad), int(unpad))
        columns, rows = (value // self.size for value in self.resolution(width, height))
        if self.merge == "flat":  # tile by tile: a single column of tiles
            columns, rows = 1, columns * rows
        across, down = columns * self.side, rows * self.side
        if not unpad:
            return Layout(columns, rows, 0, 0, across, down, 0)
        left, top = _padding(width, height, across, down)
        return Layout(columns, rows, left, top, *self._shrunk(across - 2 * left, down - 2 * top), 1)

    def tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of so many pixels, newlines included."""
        return self.layout(width, height).tokens(self.side)

    def views(self, picture: Image.Image) -> list[Image.Image]:
        """The RGB pictures to be squashed to squares of `size` pixels: the base view, then the tiles, row by row."""
        picture = picture.convert("RGB")
        if self.aspect == "square":
            return [picture]
        width, height = picture.size
        if self.aspect == "pad":
            longest = max(width, height)
            return [_centered(picture, (longest, longest), PAD_COLOR)]
        target = self.resolution(width, height)
        large = _centered(picture.resize(_fitted(picture.size, target), Image.Resampling.BICUBIC), target, (0, 0, 0))
        corners = [(x, y) for y in range(0, target[1], self.size) for x in range(0, target[0], self.size)]
        return [picture, *(large.crop((x, y, x + self.size, y + self.size)) for x, y in corners)]

    def _shrunk(self, width: int, height: int) -> tuple[int, int]:
        if self.max_tiles is None:
            return width, height
        times = math.sqrt(height * width / (self.max_tiles * self.side**2))
        if times <= ENLARGED:
            return width, height
        return max(1, int(width // times)), max(1, int(height // times))


def _fitted(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect within the target; the free side is rounded up."""
    across, down = target[0] / size[0], target[1] / size[1]
    if across < down:
        return target[0], min(math.ceil(size[1] * across), target[1])
    return min(math.ceil(size[0] * down), target[0]), target[1]


def _padding(width: int, height: int, across: int, down: int) -> tuple[int, int]:
    """Token columns and rows that are padding on each side, when a picture lies in a grid of `across` x `down` tokens."""
    if width / height > across / down:
        return 0, (down - int(height * (across / width))) // 2
    return (across - int(width * (down / height))) // 2, 0


def _centered(picture: Image.Image, size: tuple[int, int], color: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, color)
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas
