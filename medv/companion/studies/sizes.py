"""Sizes of a model and the cost of each stage by arithmetic (notebook 03, Table 6); models are built on the meta device."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from medv import paper
from medv.checkpoints.assembly import shape_config
from medv.checkpoints.released import lladav_to_llada8b, medv_to_lladav
from medv.companion.figures.plots import drawing
from medv.companion.studies.node import Node
from medv.data.chat import SpecialTokens
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.views import ViewPlan
from medv.profiles import PAPER, ModelShape, Profile
from medv.training.costs import bytes_per_parameter
from medv.training.lora import freeze_except

NODES = (Node("model", "03_model_and_checkpoints.ipynb", "The model, its stages and its checkpoints", results=("table6",)),)

_VISION = {
    "siglip": "SigLIP, {0.vision_layers} x {0.vision_hidden_size}",
    "efficientnet_lite0": "EfficientNet-Lite0, {0.image_size} pixels",
}
_TRAINED = {"bundled": "trained here", "packages": "SmolLM2-135M unless chosen otherwise"}
_RELEASED = {"vision_tower": "siglip2-so400m-patch14-384", "language_tower": "LLaDA-8B-Instruct", "deepspeed": "ZeRO-3"}
_ONE_LAYER = replace(PAPER.model, layers=1, vision_layers=1)


def empty_model(shape: ModelShape) -> MedVForMaskedDiffusion:
    """A model of that shape on the meta device: names and sizes without memory."""
    with torch.device("meta"):
        return MedVForMaskedDiffusion(shape_config(shape, SpecialTokens(*range(7))))


def parameter_counts(shapes: Mapping[str, ModelShape]) -> pd.DataFrame:
    """Parameters of each part, one column per shape. The language tower includes its output head, counted once if tied."""
    parts = {"vision tower": "model.vision_tower.", "projector": "model.projector."}
    columns = {}
    for name, shape in shapes.items():
        sizes = {key: value.numel() for key, value in empty_model(shape).named_parameters()}
        counts = {part: sum(n for key, n in sizes.items() if key.startswith(start)) for part, start in parts.items()}
        total = sum(sizes.values())
        columns[name] = counts | {"language tower": total - sum(counts.values()), "all": total}
    return pd.DataFrame(columns).rename_axis("part").reset_index()


def recipe_table(profile: Profile) -> pd.DataFrame:
    """Table 6: the recipes of this profile beside the paper's; "vqa" is the paper's VQA-RAD column."""
    model = profile.model
    rows = {
        "vision_tower": _VISION[model.vision].format(model),
        "language_tower": f"Llama, {model.layers} x {model.hidden_size}, {_TRAINED.get(profile.towers)}",
        "projector": "2-layer MLP with GELU",
        "attention": "bidirectional",
        "deepspeed": "none",
        "optimizer": "AdamW",
    }
    if profile.towers == "given":
        rows |= _RELEASED
    recipes = profile.stages | profile.vqa_sets
    ours = [{"setting": name} | dict.fromkeys(recipes, value) for name, value in rows.items()]
    fields = {
        "scheduler": lambda r: f"cosine, {100 * r.warmup:g}% warmup",
        "global_batch_size": lambda r: r.batch_size,
        "model_max_length": lambda r: min(r.max_length, model.max_positions),
        "training_samples": lambda r: r.samples,
        "epochs": lambda r: f"{r.epochs:g}",
        "learning_rate": lambda r: f"{r.learning_rate:g}",
        "trains": lambda r: " + ".join(r.trains),
        "loss": lambda r: f"{r.normalization}, {r.times} t, {r.loss_tokens} tokens, padding {r.padding}",
    }
    ours += [{"setting": f} | {s: str(of(r)) for s, r in recipes.items()} for f, of in fields.items()]
    published = paper.table("table6").rename(
        columns={"alignment": "align", "md_sft": "instruct", "sd_sft_vqa_rad": "vqa"}
        | {f"sd_sft_{name}": name for name in ("slake", "pathvqa")}
    )
    frame = pd.DataFrame(ours).merge(published[["setting", *recipes]], "left", "setting", suffixes=(" (ours)", " (paper)"))
    return frame[["setting", *(f"{stage} ({side})" for stage in recipes for side in ("ours", "paper"))]]


def stage_memory(profile: Profile) -> pd.DataFrame:
    """Memory of training without activations, in GB (1e9 bytes), by arithmetic: for a trainable parameter weight, gradient and
    AdamW's two moments in float32, in bfloat16 also a float32 copy; for a frozen one the weight alone.
    """
    weight, gradient, optimizer = bytes_per_parameter(half=profile.dtype == "bfloat16")
    model = empty_model(profile.model)
    total = sum(p.numel() for p in model.parameters())
    rows = []
    for stage, recipe in profile.stages.items():
        trainable = freeze_except(model, recipe.trains)
        sizes = (weight * total / 1e9, gradient * trainable / 1e9, optimizer * trainable / 1e9)
        row = {"stage": stage, "trains": " + ".join(recipe.trains), "trainable": trainable}
        row["share (%)"] = 100 * trainable / total
        rows.append(row | dict(zip(("weights", "gradients", "optimizer"), sizes, strict=True)) | {"sum (GB)": sum(sizes)})
    return pd.DataFrame(rows)


def released_views() -> ViewPlan:
    """How LLaDA-V, whose recipe the released medical model follows, cuts an image: anyres_max_4, spatial_unpad."""
    grid = tuple((384 * w, 384 * h) for w in range(1, 7) for h in range(1, 7))
    return ViewPlan(size=384, side=27, aspect="anyres", grid=grid, max_tiles=4, merge="spatial_unpad")


def visual_tokens(plan: ViewPlan, sizes: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Where the visual tokens of images [width, height] go: the base view, the grid of tiles, the newlines of its rows."""
    rows = []
    for width, height in sizes:
        layout = plan.layout(width, height)
        newlines = layout.height * layout.newline
        parts = {"base view": plan.side**2, "tiles": layout.height * layout.width, "newlines": newlines}
        grid = f"{layout.columns} x {layout.rows}" if layout.columns else "none"
        rows.append({"image": f"{width} x {height}", "tiles of 384 px": grid} | parts | {"all": plan.tokens(width, height)})
    return pd.DataFrame(rows)


def visual_tokens_figure(table: pd.DataFrame) -> Figure:
    """`visual_tokens` as stacked bars."""
    with drawing(7.2, 0.42 * len(table) + 1.2) as (fig, ax):
        left = np.zeros(len(table))
        for part in ("base view", "tiles", "newlines"):
            ax.barh(table["image"], table[part], left=left, label=part)
            left += table[part].to_numpy()
        for place, count in enumerate(table["all"]):
            ax.text(count + 30, place, f"{count:,}", va="center", fontsize=8)
        ax.invert_yaxis()
        ax.set(xlabel="visual tokens", ylabel="image, pixels", xlim=(0, 1.12 * left.max()))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3)
    return fig


def key_map() -> pd.DataFrame:
    """The names of the same tensors in the released layouts and in medv's; {i} is the number of a layer."""
    names = [name.replace("layers.0.", "layers.{i}.") for name in empty_model(_ONE_LAYER).state_dict()]
    rows = [{"medv": name, "LLaDA-V": medv_to_lladav(name)} for name in dict.fromkeys(names)]
    for row in rows:
        old = lladav_to_llada8b(row["LLaDA-V"].replace("{i}", "0")) or "-"
        row["LLaDA-8B"] = old.replace("blocks.0.", "blocks.{i}.")
    return pd.DataFrame(rows)


@torch.inference_mode()
def reach(model: MedVForMaskedDiffusion, ids: torch.Tensor) -> np.ndarray:
    """[T, T] bool: row i, column j is true if replacing token j of ids [T] by the mask changes hidden state i."""
    ids = ids.to(model.device)
    changed = ids.repeat(len(ids), 1)
    changed.fill_diagonal_(model.config.mask_token_id)
    moved = model(changed).last_hidden_state - model(ids[None]).last_hidden_state  # [changed j, position i, D]
    return (moved.norm(dim=-1) > 1e-5).T.cpu().numpy()


def reach_figure(panels: Mapping[str, np.ndarray], tokens: Sequence[str]) -> Figure:
    """`reach` as a grid for each of several models."""
    with drawing(4.2 * len(panels), 4.0, ncols=len(panels), squeeze=False) as (fig, axes):
        for ax, (name, felt) in zip(axes[0], panels.items(), strict=True):
            ax.imshow(felt, cmap="Blues", vmin=0, vmax=1.4)
            ax.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=7.5)
            ax.set_yticks(range(len(tokens)), tokens, fontsize=7.5)
            ax.set(title=name, xlabel="token that is changed", ylabel="state that moves")
            ax.grid(False)
    return fig
