"""From the visual tokens of views to those of images: tiles put together, padding dropped, rows ended (LLaVA-NeXT's merge).

It does what a `medv.model.views.Layout` says and decides nothing itself; it knows no picture and no aspect mode.
"""

import math

import torch
import torch.nn.functional as F

from medv.model.views import Layout


def merge_views(features: torch.Tensor, layouts: torch.Tensor, newline: torch.Tensor | None) -> torch.Tensor:
    """Visual tokens [T, D] of all images, one after the other.

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
    """Average squares of size * size patches of a square grid: [n, P, D] -> [n, P / size**2, D], row by row."""
    if size == 1:
        return features
    side = math.isqrt(features.shape[1])
    grid = features.unflatten(1, (side // size, size, side // size, size))  # [n, s, size, s, size, D]
    return grid.mean(dim=(2, 4)).flatten(1, 2)
