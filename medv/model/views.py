"""From a picture to the square views of the vision tower, and from their features to visual tokens (LLaVA-NeXT's AnyRes).

Aspect modes (those of LLaVA-NeXT, LLaDA-V and LLaDA-MedV): "square" squashes the picture to one view; "pad" first makes it
square with gray; "anyres" cuts an enlarged picture into tiles of the tower's size, after a base view of the whole. Merge
types: "flat" concatenates the views; "spatial" reads the tiles as one large picture, row by row; "spatial_unpad" also drops
the tokens of the black padding, shrinks what is too large and ends each row with a newline. Floats are rounded where the
reference rounds them, because one pixel can decide about a row of tokens.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from medv import limits

ASPECTS = ("square", "pad", "anyres")
MERGES = ("flat", "spatial", "spatial_unpad")
PAD_COLOR = (127, 127, 127)  # int(255 * 0.5): the mean of the tower's normalization
MOST = 1024  # limit of sizes in a grid and of tiles per image: the released models have 36 of each
ENLARGED = 1.1  # a grid is shrunk only where its side is more than 1.1 times that of `max_tiles` tiles


@dataclass(frozen=True)
class Layout:
    """The order of the visual tokens of one image: the base view, then a grid of tile tokens, row by row."""

    columns: int  # tiles; 0 where there is only the base view
    rows: int
    left: int  # token columns cut off on the left, and as many on the right
    top: int  # token rows cut off above, and as many below
    width: int  # tokens of the grid after cutting and shrinking
    height: int
    newline: int  # 1 where a newline token ends each row; an image without tiles then has one row of width 0

    @property
    def views(self) -> int:
        """Number of square views, the base included."""
        return 1 + self.columns * self.rows

    def tokens(self, side: int) -> int:
        """Number of visual tokens, with `side` tokens along the side of one view."""
        return side * side + self.height * (self.width + self.newline)


@dataclass(frozen=True)
class ViewPlan:
    """How pictures of any size become views and tokens; raises ValueError for settings that do not fit together."""

    size: int  # pixels along the side of a view
    side: int  # visual tokens along it
    aspect: str = "square"
    grid: tuple[tuple[int, int], ...] = ()  # the sizes [width, height] in pixels that "anyres" may enlarge a picture to
    max_tiles: int | None = None  # the N of anyres_max_N: "spatial_unpad" shrinks larger grids to about so many tiles
    merge: str = "flat"

    @classmethod
    def of(cls, owner: Any, size: int, side: int) -> Self:
        """The plan of a configuration or processor with image_aspect, image_grid, image_max_tiles and patch_merge."""
        grid = tuple(tuple(pair) for pair in owner.image_grid)
        return cls(size, side, owner.image_aspect, grid, owner.image_max_tiles, owner.patch_merge)

    def __post_init__(self):
        limits.named("image_aspect", self.aspect, ASPECTS)
        limits.named("patch_merge", self.merge, MERGES)
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
                raise ValueError(f"image_grid holds {list(pair)}: give [width, height] in multiples of {self.size} pixels")
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
        across, down, left, top = columns * self.side, rows * self.side, 0, 0
        if not unpad:
            return Layout(columns, rows, 0, 0, across, down, 0)
        if width / height > across / down:  # padded above and below
            top = (down - int(height * (across / width))) // 2
        else:
            left = (across - int(width * (down / height))) // 2
        across, down = across - 2 * left, down - 2 * top
        if self.max_tiles is not None:
            times = math.sqrt(down * across / (self.max_tiles * self.side**2))
            if times > ENLARGED:
                across, down = max(1, int(across // times)), max(1, int(down // times))
        return Layout(columns, rows, left, top, across, down, 1)

    def tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of so many pixels, newlines included."""
        return self.layout(width, height).tokens(self.side)

    def views(self, picture: Image.Image) -> list[Image.Image]:
        """RGB pictures, the base view and then the tiles, row by row; the processor squashes each to `size` pixels a side."""
        picture = picture.convert("RGB")
        if self.aspect == "square":
            return [picture]
        width, height = picture.size
        if self.aspect == "pad":
            longest = max(width, height)
            return [_centered(picture, (longest, longest), PAD_COLOR)]
        target, fitted = self._enlarged(width, height)
        large = _centered(picture.resize(fitted, Image.Resampling.BICUBIC), target, (0, 0, 0))
        corners = [(x, y) for y in range(0, target[1], self.size) for x in range(0, target[0], self.size)]
        return [picture, *(large.crop((x, y, x + self.size, y + self.size)) for x, y in corners)]

    def _enlarged(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size of all tiles together and, in their middle, of the picture: the largest of its aspect, rounded up."""
        target = self.resolution(width, height)
        across, down = target[0] / width, target[1] / height
        if across < down:
            return target, (target[0], min(math.ceil(height * across), target[1]))
        return target, (min(math.ceil(width * down), target[0]), target[1])

    def places(self, width: int, height: int) -> torch.Tensor:
        """Where the visual tokens of a picture of so many pixels look: their centers (x, y) as fractions of the picture,
        float64 [T, 2]; outside 0 .. 1 in padding, NaN for newlines.
        """
        plan, side, whole = self.layout(width, height), self.side, (width, height)
        if self.aspect == "pad":
            longest = max(whole)
            spans = [(-((longest - size) // 2) / size, (longest - (longest - size) // 2) / size) for size in whole]
        else:
            spans = [(0.0, 1.0), (0.0, 1.0)]
        parts = [_centers(side, side, *spans)]
        if plan.views > 1:
            target, fitted = self._enlarged(width, height)
            starts = [(all_ - own) // 2 for all_, own in zip(target, fitted, strict=True)]
            spans = [(-start / own, (all_ - start) / own) for start, all_, own in zip(starts, target, fitted, strict=True)]
            columns, rows = (size // self.size * side for size in target)  # tokens along the tiles
            if self.merge == "flat":
                grid = _centers(columns, rows, *spans).reshape(rows // side, side, columns // side, side, 2)
                parts.append(grid.transpose(1, 2).reshape(-1, 2))
            else:
                cuts = [(plan.left / columns, spans[0]), (plan.top / rows, spans[1])]
                spans = [(low + cut * (high - low), high - cut * (high - low)) for cut, (low, high) in cuts]
                grid = _centers(plan.width, plan.height, *spans).reshape(plan.height, plan.width, 2)
                parts.append(F.pad(grid, (0, 0, 0, plan.newline), value=math.nan).flatten(0, 1))
        elif plan.newline:
            parts.append(torch.full((1, 2), math.nan, dtype=torch.float64))
        return torch.cat(parts)


def _centers(columns: int, rows: int, across: tuple[float, float], down: tuple[float, float]) -> torch.Tensor:
    """The centers (x, y) of a grid over these spans, row by row: float64 [rows * columns, 2]."""
    x, y = (
        low + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (high - low)
        for count, (low, high) in ((columns, across), (rows, down))
    )
    return torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1).reshape(-1, 2)


def _centered(picture: Image.Image, size: tuple[int, int], color: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, color)
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas


def merge_views(features: torch.Tensor, layouts: torch.Tensor, newline: torch.Tensor | None) -> torch.Tensor:
    """Visual tokens [T, D] of all images, concatenated.

    features [n, N, D] of the views of all images, N a square; layouts [m, 7] int64, the fields of `Layout` of each image;
    newline [D], or None in a model without. Raises ValueError where views and layouts do not belong together.
    """
    plans = [Layout(*row) for row in layouts.tolist()]
    wanted = sum(plan.views for plan in plans)
    if wanted != len(features):
        raise ValueError(f"the layouts are of {wanted} views but there are {len(features)}: let MedVProcessor build both")
    if newline is None and any(plan.newline for plan in plans):
        raise ValueError(
            "the rows of an image are to end with a newline, but this model has no image_newline: use a processor whose "
            "patch_merge is that of the model"
        )
    parts = []
    for plan, views in zip(plans, features.split([plan.views for plan in plans]), strict=True):
        parts.append(views[0])
        if plan.height:
            rows = _grid(views[1:], plan)  # [height, width, D]
            if plan.newline:
                rows = torch.cat([rows, newline.to(rows).expand(plan.height, 1, -1)], dim=1)
            parts.append(rows.flatten(0, 1))
    return torch.cat(parts)


def _grid(tiles: torch.Tensor, plan: Layout) -> torch.Tensor:
    """Tiles [columns * rows, N, D] -> tokens [height, width, D]."""
    count, size, depth = tiles.shape
    if not count:
        return tiles.new_zeros(plan.height, plan.width, depth)
    side = math.isqrt(size)
    grid = tiles.reshape(plan.rows, plan.columns, side, side, depth).transpose(1, 2)
    grid = grid.reshape(plan.rows * side, plan.columns * side, depth)
    grid = grid[plan.top : len(grid) - plan.top, plan.left : grid.shape[1] - plan.left]
    if grid.shape[:2] == (plan.height, plan.width):
        return grid
    channels_first = grid.permute(2, 0, 1)[None]  # [1, D, h, w]
    return F.interpolate(channels_first, size=(plan.height, plan.width), mode="bilinear")[0].permute(1, 2, 0)


def pool_patches(features: torch.Tensor, size: int) -> torch.Tensor:
    """Average squares of size * size patches of a square grid, row by row: [n, P, D] -> [n, P / size**2, D]."""
    if size == 1:
        return features
    side = math.isqrt(features.shape[1])
    grid = features.unflatten(1, (side // size, size, side // size, size))  # [n, s, size, s, size, D]
    return grid.mean(dim=(2, 4)).flatten(1, 2)
