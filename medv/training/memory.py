"""What a stage needs of each GPU's memory, of the disk and of time, by arithmetic, before anything is loaded.

Exact are weights, gradients and optimizer states: 16 bytes for a trainable parameter (bfloat16 weight and gradient, float32
master copy and AdamW's two moments, as DeepSpeed holds them; or weight, gradient and moments in float32), cut by the ZeRO
stage. Activations are an estimate from the sizes of a Llama layer at the recipe's longest sequence. Exact are also the tensors
of a checkpoint; hours follow from assumptions that stand beside them. Nothing here is measured.
"""

import os
from dataclasses import asdict, dataclass, replace

import torch
from rich.table import Table

from medv import limits
from medv.diffusion.loss import CHUNK
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion
from medv.profiles import StageRecipe
from medv.training.lora import LoraRecipe
from medv.training.meter import PEAK_TFLOPS, peak_flops, training_flops
from medv.training.stages import freeze_except, training_steps

GB = 1e9
TEXT = 250  # tokens of an example beside its image
RESERVE = 1.5 * GB  # the CUDA context, communication buffers and what fragmentation loses


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU, and what the plan is for. zero: 0 is no DeepSpeed. capacity: of one GPU, None where not known."""

    gpus: int
    zero: int
    micro_batch: int
    length: int
    trainable: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserve: float = RESERVE
    capacity: float | None = None

    @property
    def parts(self) -> dict[str, float]:
        """The summands of the total, in bytes."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "reserve")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> float:
        """Bytes that each GPU must have."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the total is within the capacity; an unknown capacity counts as enough."""
        return self.capacity is None or self.total <= self.capacity

    def sentence(self) -> str:
        """The arithmetic in one line."""
        terms = " + ".join(f"{name} {value / GB:.2f}" for name, value in self.parts.items())
        zero = f", ZeRO-{self.zero}" if self.zero else ""
        where = f"{self.gpus} device{'s' if self.gpus > 1 else ''}{zero}, {self.micro_batch} x {self.length} tokens each"
        return f"memory plan for {where}: {terms} = {self.total / GB:.2f} GB a device"

    def table(self, title: str) -> Table:
        """The same as a table for a terminal."""
        table = Table("", "GB a device", title=title, caption=self.sentence().partition(":")[0])
        table.columns[1].justify = "right"
        for name, value in (self.parts | {"sum": self.total}).items():
            table.add_row(name, f"{value / GB:.2f}")
        if self.capacity is not None:
            table.add_row("there is", f"{self.capacity / GB:.2f}")
        return table

    def to_dict(self) -> dict:
        """A JSON-able copy with the total and whether it fits."""
        return asdict(self) | {"total": self.total, "fits": self.fits}


@dataclass(frozen=True)
class CostPlan:
    """Bytes on disk of a checkpoint and of the result, and seconds of computing at a share `mfu` of the peak of `gpus` cards.

    examples: seen in all, of `tokens` tokens each.
    """

    gpus: int
    card: str
    mfu: float
    examples: int
    tokens: int
    checkpoint: float
    result: float
    seconds: float

    @property
    def disk(self) -> float:
        """The most bytes at once: a checkpoint is removed when the next one, or the result, is whole."""
        return self.checkpoint + max(self.checkpoint, self.result)

    def sentence(self) -> str:
        """The arithmetic in one line, with what is assumed."""
        return (
            f"about {self.seconds / 3600:.1f} h, if the model's own operations reach {self.mfu:.0%} of the peak of "
            f"{self.gpus} x {self.card}, for {self.examples:,} examples of {self.tokens:,} tokens; {self.disk / GB:.1f} GB of "
            f"disk: a checkpoint has {self.checkpoint / GB:.1f} GB and stays until the next is whole, the result has "
            f"{self.result / GB:.2f} GB"
        )

    def to_dict(self) -> dict:
        """A JSON-able copy with the disk and the hours."""
        return asdict(self) | {"disk": self.disk, "hours": self.seconds / 3600}


def plan_cost(
    config: MedVConfig,
    recipe: StageRecipe,
    *,
    gpus: int = 1,
    zero: int = 0,
    lora: LoraRecipe | None = None,
    card: str = "A100",
    mfu: float = 0.4,
    views: int = 1,
) -> CostPlan:
    """Disk and time of a recipe whose images are cut into so many views each; a projector trained alone is saved alone.

    Raises ValueError for a card that is not in PEAK_TFLOPS.
    """
    limits.whole("views", views, 1)
    limits.real("the share of the peak", mfu, 0, 1, open_ends="least")
    if (peak := peak_flops(card)) is None:
        raise ValueError(f"the peak of a card {card!r} is not known: use one of {', '.join(PEAK_TFLOPS)}")
    total, trainable, _ = _parameters(config, recipe, lora)
    alone = recipe.trains == ("projector",)
    tokens = min(views * config.image_tokens + TEXT, recipe.max_length, config.text_config.max_position_embeddings)
    learns = not alone and lora is None
    flops = training_flops(config, rows=1, length=tokens, masked=TEXT // 2, views=views, language_learns=learns)
    examples = training_steps(recipe, recipe.samples) * recipe.batch_size
    weight = 2 if zero else 4
    result = trainable if alone else total + (trainable if lora else 0)
    checkpoint = checkpoint_bytes(total, trainable, zero=zero, weight=weight, adapters=lora is not None)
    seconds = examples * flops / (gpus * peak * mfu)
    return CostPlan(gpus, card, mfu, examples, tokens, checkpoint, weight * result, seconds)


def checkpoint_bytes(total: int, trainable: int, *, zero: int = 0, weight: int = 4, adapters: bool = False) -> int:
    """Bytes of the tensors in a checkpoint.

    They are the model (with adapters what learns alone) in `weight` bytes a parameter and AdamW's moments in float32, and of
    DeepSpeed the float32 master copy and a second copy of the weights, under ZeRO-3 of the frozen ones alone.
    """
    kept = trainable if adapters else total
    copied = {0: 0, 3: kept - trainable}.get(zero, kept)
    return weight * (kept + copied) + (12 if zero else 8) * trainable


def plan_memory(
    config: MedVConfig,
    recipe: StageRecipe,
    *,
    gpus: int = 1,
    zero: int = 0,
    lora: LoraRecipe | None = None,
    accumulation: int = 1,
    length: int | None = None,
    capacity: float | None = None,
) -> MemoryPlan:
    """The plan of a recipe for a model of that configuration, on `gpus` devices of `capacity` bytes each.

    length: tokens of the longest sequence, by default the longest that the recipe allows.

    Raises ValueError for a ZeRO stage that does not exist and for a batch that the devices cannot share.
    """
    limits.whole("the number of devices", gpus, 1)
    limits.whole("accumulation", accumulation, 1)
    if capacity is not None:
        limits.real("the memory of a device", capacity, 0, open_ends="least")
    if zero not in range(4):
        raise ValueError(f"there is no ZeRO-{zero}: use 0 (no DeepSpeed), 1, 2 or 3")
    micro_batch, rest = divmod(recipe.batch_size, gpus * accumulation)
    if rest or not micro_batch:
        raise ValueError(
            f"a batch of {recipe.batch_size} cannot be cut into {gpus} devices x {accumulation} accumulation steps: "
            "choose numbers that divide it"
        )
    total, trainable, head_learns = _parameters(config, recipe, lora)
    # DeepSpeed: bfloat16 with a float32 master copy; otherwise float32, beside which autocast keeps bfloat16 copies.
    weight, gradient, states = (2, 2, 12) if zero else (6 if recipe.precision != "float32" else 4, 4, 8)
    held = weight * total / (gpus if zero == 3 else 1)
    text, number = config.text_config, 4 if recipe.precision == "float32" else 2
    d, largest = text.hidden_size, text.vocab_size * text.hidden_size
    if zero == 3:
        held += 2 * weight * largest  # gathered for use: the largest matrix and the next
    length = length or min(recipe.max_length, text.max_position_embeddings)
    tokens = micro_batch * length
    layer = number * tokens * (11 * d + 4 * text.intermediate_size)
    inputs = number * tokens * d
    layers = text.num_hidden_layers
    return MemoryPlan(
        gpus=gpus,
        zero=zero,
        micro_batch=micro_batch,
        length=length,
        trainable=trainable,
        weights=held,
        gradients=gradient * trainable / (gpus if zero >= 2 else 1),
        optimizer=states * trainable / (gpus if zero >= 1 else 1),
        activations=inputs * layers + layer if recipe.checkpointing else layer * layers,
        logits=number * (min(CHUNK, tokens) * text.vocab_size + (largest if head_learns else 0)),
        reserve=RESERVE if capacity is None or capacity > 8 * GB else 0.0,
        capacity=capacity,
    )


def check_memory(config: MedVConfig, recipe: StageRecipe, **options) -> MemoryPlan:
    """`plan_memory`, or a ValueError with the arithmetic and the nearest way that fits where it does not."""
    plan = plan_memory(config, recipe, **options)
    if plan.fits:
        return plan
    raise ValueError(
        f"this cannot fit: {plan.sentence()}, but there are {plan.capacity / GB:.2f} GB; " + _mend(config, recipe, options)
    )


def _mend(config: MedVConfig, recipe: StageRecipe, options: dict) -> str:
    """The first change, from the least to the largest, under which the plan fits."""
    saving = replace(recipe, checkpointing=True)
    if plan_memory(config, saving, **options).fits:
        return "with checkpointing=True in the recipe it fits"
    parts = recipe.batch_size // options.get("gpus", 1)
    if plan_memory(config, saving, **options | {"accumulation": parts}).fits:
        return f"with checkpointing=True and --accumulation {parts} it fits"
    for gpus in (n for n in (1, 2, 4, 8, 16, 32) if n >= options.get("gpus", 1) and recipe.batch_size % n == 0):
        more = options | {"zero": 3, "gpus": gpus, "accumulation": recipe.batch_size // gpus}
        if plan_memory(config, saving, **more).fits:
            return f"with ZeRO-3 on {gpus} such devices, --accumulation {more['accumulation']} and checkpointing=True it fits"
    if options.get("lora") is None and "language_model" in recipe.trains:
        small = options | {"lora": LoraRecipe(), "zero": 3, "accumulation": parts}
        if plan_memory(config, saving, **small).fits:
            return "with --lora, ZeRO-3 and checkpointing=True it fits"
    return "use devices with more memory, or more of them"


def _parameters(config: MedVConfig, recipe: StageRecipe, lora: LoraRecipe | None) -> tuple[int, int, bool]:
    """All parameters, the trainable ones, and whether the head learns."""
    with torch.device("meta"):
        model = MedVForMaskedDiffusion(config)
    total, trainable = sum(p.numel() for p in model.parameters()), freeze_except(model, recipe.trains)
    head_learns = model.lm_head.weight.requires_grad
    if lora is None:
        return total, trainable, head_learns
    text = config.text_config
    d, m, share = text.hidden_size, text.intermediate_size, text.num_key_value_heads / text.num_attention_heads
    ends = 2 * (d + d) + 2 * (d + int(share * d)) + 3 * (d + m)  # q, o; k, v; gate, up, down
    adapters = lora.rank * ends * text.num_hidden_layers
    projector = sum(p.numel() for p in model.model.projector.parameters())
    return total + adapters, adapters + projector, False


def device_capacity(processes: int = 1) -> float | None:
    """Bytes of this process's GPU, or its share of the machine's memory where there is none; None where it is not told."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    except (ValueError, OSError, AttributeError):
        return None
