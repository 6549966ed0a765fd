"""Training costs, computed before a model is loaded: operations of a step; memory of each GPU, disk and time of a stage.

Weights, gradients, optimizer states (cut by the ZeRO stage) and the tensors of a checkpoint are exact. Activations are an
estimate from the sizes of a Llama layer at the longest sequence; hours follow from stated assumptions. MFU is the share of a
GPU's peak (dense, bfloat16) of the model's own operations: recomputation does not count, padding tokens do.
"""

import os
import resource
import sys
from dataclasses import asdict, dataclass, replace

import torch
from rich.table import Table

from medv import limits
from medv.diffusion.loss import CHUNK
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.vision import feature_width, view_flops
from medv.profiles import StageRecipe
from medv.training.lora import LoraRecipe, attach_lora, freeze_except, trainable_parameters
from medv.training.stream import training_steps

GB = 1e9
TEXT = 250  # tokens of an example beside its image
RESERVE = 1.5 * GB  # the CUDA context, communication buffers and what fragmentation loses
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIE": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 TFLOP/s from NVIDIA's data sheets, by a part of the name; the first match counts."""


def peak_flops(name: str) -> float | None:
    """Operations a second of a GPU of that name in bfloat16, None where it is not in the table."""
    found = (peak for part, peak in PEAK_TFLOPS.items() if part in name.upper().replace("-", " "))
    return next((1e12 * peak for peak in found), None)


def training_flops(
    config: MedVConfig, *, rows: int, length: int, masked: int, views: int = 0, language_learns: bool = True
) -> float:
    """Multiplications and additions of forward and backward pass over `rows` sequences of `length` tokens.

    `masked` positions reach the head; `views` images pass the frozen vision tower, forward alone. A frozen language tower
    costs a forward pass and the gradient of its states, as the projector lies below it, and no gradient of its weights.
    """
    text, eye = config.text_config, config.vision_config
    heads = text.num_key_value_heads / text.num_attention_heads
    d, tokens = text.hidden_size, rows * length
    layer = (2 + 2 * heads) * d * d + 3 * d * text.intermediate_size
    linear = 2 * tokens * layer * text.num_hidden_layers + 2 * masked * d * text.vocab_size
    attention = 4 * tokens * length * d * text.num_hidden_layers
    look = views * view_flops(eye) if views else 0
    project = 6 * views * config.image_tokens * (feature_width(eye) * d + d * d)
    return linear * (3 if language_learns else 2) + 3 * attention + look + project


def mfu(flops: float, seconds: float) -> float | None:
    """The share of this GPU's peak; None on a CPU or a GPU that is not in the table."""
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else flops / seconds / peak


def peak_bytes() -> int:
    """The most memory so far: of the allocator on CUDA, resident in this process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bytes_per_parameter(*, half: bool) -> tuple[int, int, int]:
    """Weight, gradient and optimizer states of a trainable parameter.

    In float32 AdamW holds two moments; in bfloat16 (`half`), as DeepSpeed does, they and a float32 master copy.
    """
    return (2, 2, 12) if half else (4, 4, 8)


@dataclass(frozen=True)
class StagePlan:
    """Bytes on each GPU and on disk, seconds of computing, and what they are for. zero: 0 is no DeepSpeed.

    parts: bytes on each GPU by name. capacity: bytes of one GPU, None where not known. checkpoint, result: bytes on disk.
    seconds: for `examples` examples of `tokens` tokens each, at a share `mfu` of the peak of the cards.
    """

    gpus: int
    zero: int
    micro_batch: int
    length: int
    trainable: int
    parts: dict[str, float]
    capacity: float | None
    card: str
    mfu: float
    examples: int
    tokens: int
    checkpoint: float
    result: float
    seconds: float

    @property
    def total(self) -> float:
        """Bytes that each GPU must have."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the total is within the capacity; an unknown capacity counts as enough."""
        return self.capacity is None or self.total <= self.capacity

    @property
    def disk(self) -> float:
        """The most bytes at once: a checkpoint is removed when the next one, or the result, is whole."""
        return self.checkpoint + max(self.checkpoint, self.result)

    def memory_sentence(self) -> str:
        """The arithmetic of the memory in one line."""
        terms = " + ".join(f"{name} {value / GB:.2f}" for name, value in self.parts.items())
        zero = f", ZeRO-{self.zero}" if self.zero else ""
        where = f"{self.gpus} device{'s' if self.gpus > 1 else ''}{zero}, {self.micro_batch} x {self.length} tokens each"
        return f"memory plan for {where}: {terms} = {self.total / GB:.2f} GB a device"

    def cost_sentence(self) -> str:
        """Time and disk in one line, with what is assumed."""
        return (
            f"about {self.seconds / 3600:.1f} h, if the model's own operations reach {self.mfu:.0%} of the peak of "
            f"{self.gpus} x {self.card}, for {self.examples:,} examples of {self.tokens:,} tokens; {self.disk / GB:.1f} GB of "
            f"disk: a checkpoint has {self.checkpoint / GB:.1f} GB and stays until the next is whole, the result has "
            f"{self.result / GB:.2f} GB"
        )

    def table(self, title: str) -> Table:
        """The memory as a table for a terminal."""
        table = Table("", "GB a device", title=title, caption=self.memory_sentence().partition(":")[0])
        table.columns[1].justify = "right"
        there_is = {} if self.capacity is None else {"there is": self.capacity}
        for name, value in (self.parts | {"sum": self.total} | there_is).items():
            table.add_row(name, f"{value / GB:.2f}")
        return table

    def to_dict(self) -> dict:
        """A JSON-able copy with the sums."""
        fields = {name: value for name, value in asdict(self).items() if name != "parts"}
        return fields | self.parts | {"total": self.total, "fits": self.fits, "disk": self.disk, "hours": self.seconds / 3600}


def plan_stage(
    config: MedVConfig,
    recipe: StageRecipe,
    *,
    gpus: int = 1,
    zero: int = 0,
    lora: LoraRecipe | None = None,
    accumulation: int = 1,
    length: int | None = None,
    capacity: float | None = None,
    card: str = "A100",
    mfu: float = 0.4,
    views: int = 1,
) -> StagePlan:
    """The plan of a recipe for a model of that configuration, on `gpus` devices of `capacity` bytes each.

    length: tokens of the longest sequence, by default the longest that the recipe allows. views: parts that an image is cut
    into. A projector trained alone is saved alone. Raises ValueError for a ZeRO stage that does not exist, a batch that the
    devices cannot share and a card that is not in PEAK_TFLOPS.
    """
    for name, value in (("the number of devices", gpus), ("accumulation", accumulation), ("views", views)):
        limits.whole(name, value, 1)
    if capacity is not None:
        limits.real("the memory of a device", capacity, 0, open_ends="least")
    limits.real("the share of the peak", mfu, 0, 1, open_ends="least")
    if zero not in range(4):
        raise ValueError(f"there is no ZeRO-{zero}: use 0 (no DeepSpeed), 1, 2 or 3")
    if (peak := peak_flops(card)) is None:
        raise ValueError(f"the peak of a card {card!r} is not known: use one of {', '.join(PEAK_TFLOPS)}")
    micro_batch, rest = divmod(recipe.batch_size, gpus * accumulation)
    if rest or not micro_batch:
        raise ValueError(
            f"a batch of {recipe.batch_size} cannot be cut into {gpus} devices x {accumulation} accumulation steps: "
            "choose numbers that divide it"
        )
    with torch.device("meta"):
        model = MedVForMaskedDiffusion(config)
        total, trainable = sum(p.numel() for p in model.parameters()), freeze_except(model, recipe.trains)
        if lora is not None:
            adapted = attach_lora(model, lora)
            total += sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
            trainable = trainable_parameters(adapted)
    text, longest = config.text_config, min(recipe.max_length, config.text_config.max_position_embeddings)

    weight, gradient, states = bytes_per_parameter(half=zero > 0)
    held = weight if zero or recipe.precision == "float32" else weight + 2  # and the bfloat16 copies of autocast
    largest = text.vocab_size * text.hidden_size
    number, inner = 4 if recipe.precision == "float32" else 2, micro_batch * (length or longest)
    layer = number * inner * (11 * text.hidden_size + 4 * text.intermediate_size)
    inputs, layers = number * inner * text.hidden_size, text.num_hidden_layers
    logits = min(CHUNK, inner) * text.vocab_size + (largest if model.lm_head.weight.requires_grad else 0)
    parts = {
        # under ZeRO-3 the largest matrix and the next are gathered for use
        "weights": held * total / gpus + 2 * held * largest if zero == 3 else held * total,
        "gradients": gradient * trainable / (gpus if zero >= 2 else 1),
        "optimizer": states * trainable / (gpus if zero >= 1 else 1),
        "activations": inputs * layers + layer if recipe.checkpointing else layer * layers,
        "logits": number * logits,
        "reserve": RESERVE if capacity is None or capacity > 8 * GB else 0.0,
    }

    alone = recipe.trains == ("projector",)
    tokens = min(views * config.image_tokens + TEXT, longest)
    sizes = {"rows": 1, "length": tokens, "masked": TEXT // 2, "views": views}
    flops = training_flops(config, **sizes, language_learns=not alone and lora is None)
    examples = training_steps(recipe, recipe.samples) * recipe.batch_size
    return StagePlan(
        gpus=gpus,
        zero=zero,
        micro_batch=micro_batch,
        length=length or longest,
        trainable=trainable,
        parts=parts,
        capacity=capacity,
        card=card,
        mfu=mfu,
        examples=examples,
        tokens=tokens,
        checkpoint=checkpoint_bytes(total, trainable, zero=zero, weight=weight, adapters=lora is not None),
        result=weight * (trainable if alone else total + (trainable if lora else 0)),
        seconds=examples * flops / (gpus * peak * mfu),
    )


def check_memory(config: MedVConfig, recipe: StageRecipe, **options) -> StagePlan:
    """`plan_stage`, or a ValueError with the arithmetic and the smallest change under which the plan fits."""
    plan = plan_stage(config, recipe, **options)
    if plan.fits:
        return plan
    saving, gpus = replace(recipe, checkpointing=True), plan.gpus
    parts, also = recipe.batch_size // gpus, "" if recipe.checkpointing else " and --checkpointing"
    changes = {"with --checkpointing it fits": {}, f"with --accumulation {parts}{also} it fits": {"accumulation": parts}}
    for more in (n for n in (1, 2, 4, 8, 16, 32) if n >= gpus and recipe.batch_size % n == 0):
        cut = {"zero": 3, "gpus": more, "accumulation": recipe.batch_size // more}
        changes[f"with ZeRO-3 on {more} such devices, --accumulation {cut['accumulation']}{also} it fits"] = cut
    if options.get("lora") is None and "language_model" in recipe.trains:
        cut = {"lora": LoraRecipe(), "zero": 3, "accumulation": parts}
        changes[f"with --lora, ZeRO-3, --accumulation {parts}{also} it fits"] = cut
    mends = (said for said, change in changes.items() if plan_stage(config, saving, **options | change).fits)
    mend = next(mends, "use devices with more memory, or more of them")
    raise ValueError(f"this cannot fit: {plan.memory_sentence()}, but there are {plan.capacity / GB:.2f} GB; {mend}")


def checkpoint_bytes(total: int, trainable: int, *, zero: int = 0, weight: int = 4, adapters: bool = False) -> int:
    """Bytes of the tensors in a checkpoint: the model (with adapters what learns alone) in `weight` bytes a parameter, and the
    optimizer's states. DeepSpeed keeps a second copy of the weights, under ZeRO-3 of the frozen ones alone.
    """
    kept = trainable if adapters else total
    copied = {0: 0, 3: kept - trainable}.get(zero, kept)
    return weight * (kept + copied) + bytes_per_parameter(half=zero > 0)[2] * trainable


def device_capacity(processes: int = 1) -> float | None:
    """Bytes of this process's GPU, or its share of the machine's memory where there is none; None where that is unknown."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    except (ValueError, OSError, AttributeError):
        return None
