"""The one dial: everything that differs between a laptop, one GPU and the paper's machine, as frozen data.

`tiny` runs on two CPU cores without network or weights, `small` on one GPU from pretrained towers with real VQA-RAD images,
`paper` is Table 6 of the paper with the released weights; `smoke` is for the tests, and nothing it makes is a result. A
profile is printed and saved with every artifact, and every number in it is checked when it is made (ValueError). This module
imports nothing but the standard library.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from medv import limits

STAGES = ("align", "instruct", "vqa")
SAMPLERS = ("medv", "official")
PRECISIONS = ("auto", "float32")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the network. vision_* describe the vision tower, image_pool how many of its features a side become one visual
    token by averaging (1 in the release), feature_norm what happens to them then, the rest the language tower.

    vision is "siglip", or "efficientnet_lite0", whose own layers are fixed: one feature for 32 pixels a side, 1,280 channels.
    key_value_heads: None = as many as heads.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocab_size: int
    image_size: int
    patch_size: int
    vision: str = "siglip"
    vision_hidden_size: int = 0
    vision_intermediate_size: int = 0
    vision_layers: int = 0
    vision_heads: int = 0
    image_pool: int = 1
    feature_norm: str = "none"
    key_value_heads: int | None = None
    rope_theta: float = 10_000.0
    max_positions: int = 2048
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in (name for name, kind in self.__annotations__.items() if kind is int):
            fixed = name.startswith("vision_") and self.vision != "siglip"  # the tower's own sizes
            limits.whole(name, getattr(self, name), 0 if fixed else 1)
        for name in ("rope_theta", "initializer_range"):
            limits.real(name, getattr(self, name), 0, open_ends="least")

    @property
    def image_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.image_size // self.patch_size // self.image_pool) ** 2

    @property
    def sight(self) -> dict:
        """What is made of the vision tower's features, as options of `medv.checkpoints.assembly.assemble`."""
        return {"image_pool": self.image_pool, "feature_norm": self.feature_norm}


@dataclass(frozen=True)
class StageRecipe:
    """How one stage is trained.

    trains: the parts that learn, of `medv.training.lora.PARTS`; the paper's vision tower never does. samples: training
    examples (0 = all there are). batch_size: of the whole machine. learning_rate: AdamW, cosine decay, `warmup` as a share of
    the steps; the projector's is `projector_rate` times as high. feature_dropout: share of the vision channels that a training
    step does not see (with cached_vision only). loss_tokens, padding, normalization, times: named choices of `medv.data.chat`,
    `medv.training.collate`, `medv.diffusion.loss` and `medv.training.stream`. lower_case: the short answers of a real data set
    are learned in lower case, which is how they are scored.

    What changes cost and not the result, up to rounding: checkpointing computes activations again in the backward pass;
    precision "auto" is bfloat16 where a GPU has it, or "float32"; cached_vision looks at each image once, before the first
    step. order "by_length" puts examples of like length into a batch, which spares padding and changes the companions of an
    example, by (seed, epoch) alone. sources: for each value where it comes from ("" for all that are not named).
    """

    trains: tuple[str, ...]
    samples: int
    epochs: float
    batch_size: int
    learning_rate: float
    warmup: float = 0.03
    weight_decay: float = 0.0
    projector_rate: float = 1.0
    feature_dropout: float = 0.0
    lower_case: bool = False
    max_length: int = 8192
    loss_tokens: str = "official"
    padding: str = "batch"
    normalization: str = "sample"
    times: str = "iid"
    checkpointing: bool = False
    precision: str = "auto"
    order: str = "shuffled"
    cached_vision: bool = False
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        limits.whole("samples", self.samples, 0)
        limits.whole("batch_size", self.batch_size, 1)
        limits.whole("max_length", self.max_length, 1)
        limits.real("epochs", self.epochs, 0, 1e6, open_ends="least")
        limits.real("learning_rate", self.learning_rate, 0, open_ends="least")
        limits.real("warmup", self.warmup, 0, 1, open_ends="most")
        limits.real("weight_decay", self.weight_decay, 0)
        limits.real("projector_rate", self.projector_rate, 0, open_ends="least")
        limits.real("feature_dropout", self.feature_dropout, 0, 1, open_ends="most")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}: use one of {', '.join(PRECISIONS)}")

    def settings(self) -> dict[str, Any]:
        """What the recipe says, without where that comes from; JSON-able."""
        return {name: value for name, value in asdict(self).items() if name != "sources"}


@dataclass(frozen=True)
class SamplerSpec:
    """L, B and Z of one use; how many are answered at once; and whose sampler, "medv" or "official", the reference's own."""

    gen_length: int
    block_length: int
    steps: int
    batch_size: int = 50
    preset: str = "medv"

    def __post_init__(self):
        for name in ("gen_length", "block_length", "steps", "batch_size"):
            limits.whole(name, getattr(self, name), 1)
        if self.preset not in SAMPLERS:
            raise ValueError(f"unknown preset {self.preset!r}: use one of {', '.join(SAMPLERS)}")

    def sized(self, gen_length: int, block_length: int, steps: int) -> "SamplerSpec":
        """Another L, B and Z, asked in the same way."""
        return replace(self, gen_length=gen_length, block_length=block_length, steps=steps)

    def like(self, other: "SamplerSpec") -> "SamplerSpec":
        """These L, B and Z, asked as another use is."""
        return other.sized(self.gen_length, self.block_length, self.steps)


@dataclass(frozen=True)
class Profile:
    """One position of the dial. `stages` maps align, instruct and vqa to recipes, `vqa_sets` a data set to its own recipe of
    vqa; `pretrain` the bundled towers' steps.

    `towers` says where the training begins: at the "bundled" towers, at those that `medv towers` made of "packages", or at
    weights that are "given". `side_by_side` says that heavy notebooks may share the machine: their models are small and need
    no GPU.
    """

    name: str
    purpose: str
    model: ModelShape
    stages: dict[str, StageRecipe]
    pretrain: dict[str, int]
    describe: SamplerSpec
    answer: SamplerSpec
    seeds: tuple[int, ...]
    evaluation_questions: int
    evaluation_descriptions: int
    vqa_sets: dict[str, StageRecipe] = field(default_factory=dict)
    synthetic: bool = True
    system: str | None = None
    dtype: str = "float32"
    towers: str = "bundled"
    side_by_side: bool = False
    notes: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name, steps in self.pretrain.items():
            limits.whole(f"pretrain.{name}", steps, 1)
        for number in self.seeds:
            limits.seed("a seed of the profile", number)
        for name in ("evaluation_questions", "evaluation_descriptions"):
            limits.whole(name, getattr(self, name), 1)

    def to_dict(self) -> dict:
        """A JSON-able copy."""
        return asdict(self)

    def asked(self, **how) -> "Profile":
        """The profile with another `batch_size` or `preset` wherever it generates."""
        return replace(self, describe=replace(self.describe, **how), answer=replace(self.answer, **how))

    def recipe(self, stage: str, data: str) -> StageRecipe:
        """The recipe of a stage on a data set; raises ValueError for an unknown stage."""
        if stage not in self.stages:
            raise ValueError(f"unknown stage {stage!r}: use one of {', '.join(self.stages)}")
        return self.vqa_sets.get(data, self.stages[stage]) if stage == "vqa" else self.stages[stage]

    def with_recipe(self, stage: str, **changes) -> "Profile":
        """The profile with other values in one stage's recipes; raises ValueError for an unknown stage."""
        stages = self.stages | {stage: replace(self.recipe(stage, ""), **changes)}
        sets = {name: replace(recipe, **changes) for name, recipe in self.vqa_sets.items()}
        return replace(self, stages=stages, vqa_sets=sets if stage == "vqa" else self.vqa_sets)


_BOTH = ("projector", "language_model")
_TINY_MODEL = ModelShape(
    hidden_size=128,
    intermediate_size=320,
    layers=4,
    heads=4,
    vocab_size=1536,
    vision_hidden_size=96,
    vision_intermediate_size=256,
    vision_layers=4,
    vision_heads=4,
    image_size=64,
    patch_size=8,
    image_pool=2,
    max_positions=512,
    initializer_range=0.08,
)
_TINY_NOTE = {"": "chosen on the phantoms' validation split"}

TINY = Profile(
    name="tiny",
    purpose="any laptop CPU, no network, no weights: the default",
    model=_TINY_MODEL,
    stages={
        "align": StageRecipe(
            trains=("projector",),
            samples=4000,
            epochs=2,
            batch_size=32,
            learning_rate=2e-3,
            loss_tokens="response",
            padding="none",
            normalization="masked",
            times="stratified",
            sources=_TINY_NOTE,
        ),
        "instruct": StageRecipe(
            trains=_BOTH,
            samples=5000,
            epochs=4,
            batch_size=16,
            learning_rate=1e-3,
            loss_tokens="response",
            padding="none",
            normalization="masked_sample",
            times="stratified",
            sources=_TINY_NOTE,
        ),
        "vqa": StageRecipe(
            trains=_BOTH,
            samples=10_000,
            epochs=4,
            batch_size=16,
            learning_rate=1e-3,
            loss_tokens="response",
            padding="fixed:8",
            normalization="masked",
            times="stratified",
            sources=_TINY_NOTE,
        ),
    },
    pretrain={
        "tower_steps": 4500,
        "brief_steps": 2500,
        "short_steps": 1200,
        "all_steps": 2000,
        "general_steps": 600,
        "finish_steps": 1400,
    },
    describe=SamplerSpec(gen_length=72, block_length=24, steps=72),
    answer=SamplerSpec(gen_length=8, block_length=8, steps=8),
    seeds=(0, 1, 2),
    evaluation_questions=600,
    evaluation_descriptions=100,
    side_by_side=True,
)

SMOKE = replace(
    TINY,
    name="smoke",
    purpose="the tests: every notebook in seconds; nothing it makes is a result",
    stages={name: replace(recipe, samples=24, epochs=1, batch_size=8) for name, recipe in TINY.stages.items()},
    pretrain=dict.fromkeys(TINY.pretrain, 2),
    describe=SamplerSpec(gen_length=16, block_length=8, steps=4),
    seeds=(0,),
    evaluation_questions=16,
    evaluation_descriptions=4,
)

_SMALL_NOTE = {"": "set by hand: benchmarks/small_gpu.py, which compares it with others, has not been run"}
_SMALL_STAGE = StageRecipe(
    trains=("projector", "language_layers"),
    samples=1800,
    epochs=24,
    batch_size=64,
    learning_rate=3e-4,
    weight_decay=0.05,
    projector_rate=5.0,
    feature_dropout=0.1,
    lower_case=True,
    max_length=1024,
    loss_tokens="response",
    padding="fixed:8",
    normalization="masked",
    times="stratified",
    order="by_length",
    cached_vision=True,
    sources=_SMALL_NOTE,
)
SMALL = replace(
    TINY,
    name="small",
    purpose="one GPU (or a patient CPU): phantoms and real VQA-RAD images",
    model=ModelShape(
        hidden_size=576,
        intermediate_size=1536,
        layers=30,
        heads=9,
        key_value_heads=3,
        vocab_size=49_153,
        vision="efficientnet_lite0",
        image_size=384,
        patch_size=32,
        image_pool=2,
        feature_norm="layer",
        rope_theta=100_000.0,
        max_positions=8192,
    ),
    towers="packages",
    pretrain={},
    describe=SamplerSpec(gen_length=128, block_length=32, steps=128),
    stages={
        "align": replace(
            _SMALL_STAGE,
            trains=("projector",),
            samples=4000,
            epochs=2,
            batch_size=16,
            learning_rate=1e-3,
            projector_rate=1.0,
            padding="none",
        ),
        "instruct": replace(_SMALL_STAGE, samples=4000, epochs=3, batch_size=16, padding="none"),
        "vqa": _SMALL_STAGE,
    },
    side_by_side=False,
    notes="begins from pretrained towers, which `medv towers small` brings into runs/small/towers; meant for one GPU of "
    "16 GB, on a CPU it takes days; for real images put trainset.json, testset.json and images/ of VQA-RAD into a folder "
    "and run notebook 12 with data=vqa_rad and data_dir",
)

_TABLE6 = "Table 6 of the paper"
_LLADAV = "LLaDA-V's training script; the paper does not say"
_OURS = "medv's own: it changes cost, not the result"
_SOURCES = {
    "trains": "section 3 of the paper; vision tower frozen in all stages",
    **dict.fromkeys(("samples", "epochs", "batch_size", "warmup", "max_length"), _TABLE6),
    "learning_rate": "LLaDA-V's script value, not confirmed for LLaDA-MedV: missing in the paper's text",
    **dict.fromkeys(("weight_decay", "projector_rate", "feature_dropout", "lower_case", "loss_tokens", "padding"), _LLADAV),
    "normalization": "Eq. 4 of the paper, in the form of the LLaDA guidelines",
    "times": "Eq. 1 of the paper: t is uniform, drawn for each sample",
    **dict.fromkeys(("checkpointing", "precision"), _LLADAV),
    **dict.fromkeys(("order", "cached_vision"), _OURS),
}
_PAPER_VQA = StageRecipe(_BOTH, 1797, 2, 8, 1e-5, checkpointing=True, sources=_SOURCES)
PAPER = Profile(
    name="paper",
    purpose="4 x 80 GB GPUs, network, released weights: the paper's own experiment",
    model=ModelShape(
        hidden_size=4096,
        intermediate_size=12288,
        layers=32,
        heads=32,
        vocab_size=126464,
        vision_hidden_size=1152,
        vision_intermediate_size=4304,
        vision_layers=26,
        vision_heads=16,
        image_size=384,
        patch_size=14,
        rope_theta=500_000.0,
        max_positions=16384,
        tie_word_embeddings=False,
    ),
    stages={
        "align": StageRecipe(
            ("projector",),
            600_000,
            2,
            32,
            1e-3,
            loss_tokens="plain",
            checkpointing=True,
            sources=_SOURCES | {"loss_tokens": "the reference's stage 1: image, caption, newline"},
        ),
        "instruct": StageRecipe(_BOTH, 60_000, 4, 8, 1e-5, checkpointing=True, sources=_SOURCES),
        "vqa": _PAPER_VQA,
    },
    vqa_sets={"slake": replace(_PAPER_VQA, samples=4919, epochs=10), "pathvqa": replace(_PAPER_VQA, samples=19_755, epochs=7)},
    pretrain={},
    describe=SamplerSpec(gen_length=256, block_length=64, steps=256),
    answer=SamplerSpec(gen_length=64, block_length=64, steps=64),
    seeds=(0,),
    evaluation_questions=451,
    evaluation_descriptions=193,
    synthetic=False,
    system="medical",
    dtype="bfloat16",
    towers="given",
)

PROFILES = {profile.name: profile for profile in (TINY, SMALL, PAPER, SMOKE)}


def get_profile(name: str) -> Profile:
    """The profile of that name; raises ValueError listing the names there are."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: use one of {', '.join(PROFILES)}")
    return PROFILES[name]
