"""The vision tower in the role of SigLIP2: a small SigLIP encoder trained on synthetic images (phantoms) before any language.

SigLIP2 learned from image-text pairs of the web. A tower of half a million parameters trained for minutes on one core cannot:
it is given the attributes of the drawing instead (which domain, which finding, which side, ...), at every patch token, because
the language tower will read patch tokens. The real tower never had this supervision; keep it in mind when reading the tiny
results. Images come from the training split only.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import SiglipVisionConfig, SiglipVisionModel, Trainer

from medv.checkpoints.assembly import vision_config
from medv.model.modeling import pool_patches
from medv.phantoms.general import ShapeScene, draw_shapes, sample_shapes
from medv.phantoms.pictures import draw, phantom_scene
from medv.phantoms.scene import NORMAL, Scene, split_seed
from medv.profiles import ModelShape
from medv.training.launch import RunOptions
from medv.training.trainer import OneDeviceArguments, last_checkpoint

UNKNOWN = -100
HELD_OUT = 1200  # images of the validation split that measure the accuracy
ATTRIBUTES = ("domain", "finding", "side", "level", "size", "acquisition", "shape", "color", "count")
LOCAL = ("finding", "side", "level", "size")
Values = dict[str, list[str]]  # the values of each attribute, in a fixed order


def _value(scene: Scene | ShapeScene, name: str) -> str:
    return "general" if name == "domain" and isinstance(scene, ShapeScene) else str(getattr(scene, name, None))


def _scenes(split: str, count: int) -> list[Scene | ShapeScene]:
    """`count` scenes of the tower's own range of a split; one in six is of the general family."""
    start = 500_000_000
    return [
        sample_shapes(split_seed(split, start + i)) if i % 6 == 5 else phantom_scene(split, start + i) for i in range(count)
    ]


class SceneImages(Dataset):
    """Drawn scenes in order: pixel_values [3, H, W], `labels` [A], the class indices of the attributes (UNKNOWN where one does
    not apply), and `patches` [P] bool, the patches that show the finding: those where the image differs from the same image
    without it. A drawn image is kept as bytes.
    """

    def __init__(self, scenes: Sequence[Scene | ShapeScene], values: Values, shape: ModelShape):
        self.scenes, self.values, self.size, self.patch = scenes, values, shape.image_size, shape.patch_size
        self._picture = functools.lru_cache(maxsize=None)(self._draw)

    def _draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The picture [H, W, 3] and where the finding is [H, W], both uint8."""
        scene = self.scenes[index]
        if isinstance(scene, ShapeScene):
            return draw_shapes(scene, self.size), np.zeros((self.size, self.size), np.uint8)
        picture = draw(scene, self.size)
        normal = replace(scene, finding=NORMAL, side=None, level=None, size=None)
        change = np.abs(picture.astype(int) - draw(normal, self.size)).max(axis=-1) if scene.finding != NORMAL else 0
        return picture, np.broadcast_to(change > 16, picture.shape[:2]).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        return self._item(index, *self._picture(index))

    def _item(self, index: int, picture: np.ndarray, where: np.ndarray) -> dict:
        pairs = ((self.values[name], _value(self.scenes[index], name)) for name in ATTRIBUTES)
        labels = [values.index(value) if value in values else UNKNOWN for values, value in pairs]
        side = self.size // self.patch
        share = where.reshape(side, self.patch, side, self.patch).mean(axis=(1, 3)).reshape(-1)  # [P]
        pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1  # [3, H, W]
        return {"pixel_values": pixels, "labels": torch.tensor(labels), "patches": torch.from_numpy(share > 0.25)}


class AugmentedImages(SceneImages):
    """`draws` random scenes, each shifted by up to 4 pixels and changed a little in contrast and brightness.

    The item at a position depends on (seed, position) alone. Shifts are small compared with the distance of a lesion from the
    midlines, so every label stays true.
    """

    def __init__(self, scenes: Sequence[Scene | ShapeScene], values: Values, shape: ModelShape, *, draws: int, seed: int):
        super().__init__(scenes, values, shape)
        self.draws, self.seed = draws, seed

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng([self.seed, position, 0xA06])
        index = int(rng.integers(len(self.scenes)))
        margin = self.size // 16
        top, left = rng.integers(0, 2 * margin + 1, size=2)
        rows = np.clip(np.arange(self.size) + top - margin, 0, self.size - 1)
        columns = np.clip(np.arange(self.size) + left - margin, 0, self.size - 1)
        picture, where = (plane[rows][:, columns] for plane in self._picture(index))
        changed = (picture.astype(np.float32) - 127.5) * rng.uniform(0.85, 1.15) + 127.5 + rng.uniform(-12, 12)
        return self._item(index, changed.clip(0, 255).astype(np.float32), where)


class AttributeTower(nn.Module):
    """A SigLIP encoder with linear heads: all attributes on every visual token and on their mean, and on each patch which
    finding it shows, of which side, level and size, or none.
    """

    def __init__(self, config: SiglipVisionConfig, values: Values, image_pool: int):
        super().__init__()
        self.tower = SiglipVisionModel(config)
        self.pool = image_pool
        self.sizes = [len(values[name]) for name in ATTRIBUTES]
        self.heads = nn.Linear(config.hidden_size, sum(self.sizes))
        self.patch_sizes = [len(values[name]) + 1 for name in LOCAL]
        self.patch_heads = nn.Linear(config.hidden_size, sum(self.patch_sizes))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixel_values [B, 3, H, W], labels [B, A], patches [B, P] -> loss and the logits of the mean token [B, C]."""
        tower = self.tower
        states = tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state  # [B, P, D]
        tokens = pool_patches(states, self.pool)  # [B, N, D]
        pooled = self.heads(F.layer_norm(tokens.mean(dim=1), tokens.shape[-1:]))  # [B, C]
        each = self.heads(F.layer_norm(tokens, tokens.shape[-1:]))  # [B, N, C]
        local = self.patch_heads(F.layer_norm(states, states.shape[-1:]))  # [B, P, C']
        loss = self._loss(pooled[:, None], labels) + self._loss(each, labels) + self._local_loss(local, labels, patches)
        return {"loss": loss, "logits": pooled}

    def _local_loss(self, logits: torch.Tensor, labels: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the patches, logits [B, P, C'], patches [B, P] bool; class 0 is "nothing here"."""
        losses = []
        for name, part in zip(LOCAL, logits.split(self.patch_sizes, dim=-1), strict=True):
            target = torch.where(patches, labels[:, ATTRIBUTES.index(name), None] + 1, 0)  # [B, P]
            # findings are rare among patches: without the weight a head would call every patch empty
            weight = torch.ones(part.shape[-1], device=part.device)
            weight[0] = 0.2
            losses.append(F.cross_entropy(part.flatten(0, 1), target.flatten(), weight=weight))
        return torch.stack(losses).mean()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over attributes and tokens; logits [B, n, C]."""
        losses = []
        for i, part in enumerate(logits.split(self.sizes, dim=-1)):
            target = labels[:, i].repeat_interleave(part.shape[1])
            total = F.cross_entropy(part.flatten(0, 1), target, ignore_index=UNKNOWN, reduction="sum")
            losses.append(total / ((labels[:, i] != UNKNOWN).sum().clamp_min(1) * part.shape[1]))
        losses[ATTRIBUTES.index("finding")] = 2 * losses[ATTRIBUTES.index("finding")]  # the one of many values
        return torch.stack(losses).mean()


def train_tower(shape: ModelShape, out: Path, options: RunOptions, *, steps: int, images: int) -> dict[str, float]:
    """Train the tower and save it to `out` (a SiglipVisionModel folder); returns its validation accuracy per attribute."""
    scenes = _scenes("train", images)
    values = {name: sorted({_value(scene, name) for scene in scenes} - {"None"}) for name in ATTRIBUTES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = AttributeTower(vision_config(shape), values, shape.image_pool)
    args = OneDeviceArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1.5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        logging_steps=max(1, steps // 50),
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        disable_tqdm=options.quiet,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )
    drawn = AugmentedImages(scenes, values, shape, draws=steps * args.train_batch_size, seed=options.seed)
    trainer = Trainer(model=model, args=args, train_dataset=drawn)
    # The Trainer writes its state last: a checkpoint without it is incomplete.
    trainer.train(resume_from_checkpoint=last_checkpoint(out / "checkpoints", "trainer_state.json"))
    model.eval()
    model.tower.save_pretrained(out)
    held_out = SceneImages(_scenes("validation", HELD_OUT), values, shape)
    with torch.inference_mode():
        items = [held_out[i] for i in range(len(held_out))]
        batch = {key: torch.stack([item[key] for item in items]).to(args.device) for key in items[0]}
        logits, labels = model(**batch)["logits"].cpu(), batch["labels"].cpu()  # [n, C], [n, A]
    accuracy = {}
    for name, part, target in zip(ATTRIBUTES, logits.split(model.sizes, dim=-1), labels.T, strict=True):
        known = target != UNKNOWN
        accuracy[name] = float((part.argmax(-1) == target)[known].float().mean())
    return accuracy
