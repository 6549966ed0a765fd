"""The one dial: every size, recipe and plan that differs between a laptop, one GPU and the paper's machine, as frozen data.

`tiny` runs on two CPU cores without network or weights, `small` on one GPU from pretrained towers with real VQA-RAD images,
`paper` is Table 6 of the paper with the released weights; `smoke` is for the tests, and nothing it makes is a result. Profiles
are saved with every artifact and checked on construction (ValueError). No other module asks for a profile by name.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from medv import limits

STAGES = ("align", "instruct", "vqa")
SAMPLERS = ("medv", "official")
PRECISIONS = ("auto", "float32")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the network: vision_* of the vision tower, the rest of the language tower. image_pool: features per side that
    are averaged into one visual token (1 in the release); feature_norm: applied to them afterwards. vision: "siglip", or
    "efficientnet_lite0", whose layers are fixed (one feature per 32 pixels, 1,280 channels). key_value_heads: None = heads.
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
        """How the vision tower's features are used: options of `medv.checkpoints.assembly.assemble`."""
        return {"image_pool": self.image_pool, "feature_norm": self.feature_norm}


@dataclass(frozen=True)
class StageRecipe:
    """How one stage is trained. trains: the parts that learn, from `medv.training.lora.PARTS`. samples: training examples
    (0 = all). batch_size: of the whole machine. learning_rate: AdamW with cosine decay after `warmup`, a share of the steps;
    the projector's is `projector_rate` times as high. feature_dropout: share of the vision channels hidden from a training
    step (with cached_vision only). loss_tokens, padding, normalization, times: named choices of `medv.data.chat`,
    `medv.training.collate`, `medv.diffusion.loss` and `medv.training.stream`. lower_case: for short answers of a real data set,
    which are scored in lower case. sources: where each value comes from, by field name ("" for all others).

    These change the cost and, up to rounding, not the result: checkpointing recomputes activations in the backward pass;
    precision is "float32" or "auto", bfloat16 where a GPU supports it; cached_vision encodes each image once, before the first
    step. order "by_length" batches examples of similar length: less padding, other batches, still a function of (seed, epoch).
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
        for name, least in {"samples": 0, "batch_size": 1, "max_length": 1}.items():
            limits.whole(name, getattr(self, name), least)
        limits.real("epochs", self.epochs, 0, 1e6, open_ends="least")
        for name in ("learning_rate", "projector_rate"):
            limits.real(name, getattr(self, name), 0, open_ends="least")
        for name in ("warmup", "feature_dropout"):
            limits.real(name, getattr(self, name), 0, 1, open_ends="most")
        limits.real("weight_decay", self.weight_decay, 0)
        limits.named("precision", self.precision, PRECISIONS)

    def settings(self) -> dict[str, Any]:
        """The values without their sources; JSON-able."""
        return {name: value for name, value in asdict(self).items() if name != "sources"}


@dataclass(frozen=True)
class SamplerSpec:
    """L, B and Z; the number of questions answered at once; preset: "medv", or "official", the reference's sampler."""

    gen_length: int
    block_length: int
    steps: int
    batch_size: int = 50
    preset: str = "medv"

    def __post_init__(self):
        for name in ("gen_length", "block_length", "steps", "batch_size"):
            limits.whole(name, getattr(self, name), 1)
        limits.named("preset", self.preset, SAMPLERS)

    def sized(self, gen_length: int, block_length: int, steps: int) -> "SamplerSpec":
        """Another L, B and Z with the same batch size and preset."""
        return replace(self, gen_length=gen_length, block_length=block_length, steps=steps)


@dataclass(frozen=True)
class LoraPlan:
    """Notebook 31. sizes: training questions; steps: at each size; rates: by rank, 0 = full fine-tuning; questions: test."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    rates: Mapping[int, float]
    seeds: tuple[int, ...]
    questions: int
    padded_steps: int = 0


@dataclass(frozen=True)
class InitPlan:
    """Notebook 30: steps of stages 1 and 2, the descriptions and questions asked. Steps, batch_size: 0 = the recipe's."""

    align_steps: int
    instruct_steps: int
    seeds: tuple[int, ...]
    descriptions: int
    questions: int
    describe: SamplerSpec
    answer: SamplerSpec
    batch_size: int = 0


@dataclass(frozen=True)
class AdaptPlan:
    """Notebook 14. recipe: fields of `medv.companion.towers.adapt.AdaptRecipe`; held_rows, openings: for evaluation. Without a
    text `documents` reports are drawn, or the tower writes `self_tokens` tokens.
    """

    recipe: Mapping[str, Any]
    seeds: tuple[int, ...]
    held_rows: int
    openings: int
    write: SamplerSpec
    documents: int = 0
    self_tokens: int = 0


@dataclass(frozen=True)
class FastPlan:
    """Notebook 40. oracle: canvas of its texts, `texts` per chain; descriptions, cached: images described for quality and for
    cache agreement; bench: fields of `medv.companion.bench.sampler.BenchShape`.
    """

    oracle: SamplerSpec
    texts: int
    descriptions: int
    cached: int
    bench: Mapping[str, Any]


@dataclass(frozen=True)
class Profile:
    """One position of the dial. stages: recipes of align, instruct and vqa; vqa_sets: a data set -> its own recipe of vqa;
    pretrain: training steps of the bundled towers; lora, initialization, adaptation, fast: plans of notebooks 31, 30, 14, 40.

    describe, answer: descriptions and short answers; caption: of stage 1; sentence: an answer before stage 3. draws: of the
    noise in notebook 02. band_steps, band_seeds: of the trainings of notebook 15 (0: none). towers: training starts from the
    "bundled" towers, from those that `medv towers` made of "packages", or from weights that are "given". side_by_side: heavy
    notebooks may share the machine (small models, no GPU).
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
    lora: LoraPlan
    initialization: InitPlan | None
    adaptation: AdaptPlan | None
    fast: FastPlan
    caption: SamplerSpec = SamplerSpec(32, 32, 32)
    sentence: SamplerSpec = SamplerSpec(16, 16, 16)
    draws: int = 40
    band_steps: int = 60
    band_seeds: int = 5
    vqa_sets: dict[str, StageRecipe] = field(default_factory=dict)
    synthetic: bool = True
    system: str | None = None
    dtype: str = "float32"
    towers: str = "bundled"
    side_by_side: bool = False
    notes: str = ""

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
        """The profile with another `batch_size` or `preset` wherever its models answer."""
        specs = {name: replace(getattr(self, name), **how) for name in ("describe", "answer", "caption", "sentence")}
        plan = self.initialization
        plan = plan and replace(plan, describe=replace(plan.describe, **how), answer=replace(plan.answer, **how))
        return replace(self, initialization=plan, **specs)

    def with_seeds(self, seeds: tuple[int, ...]) -> "Profile":
        """The profile and its plans with these seeds."""
        plan = self.initialization and replace(self.initialization, seeds=seeds)
        return replace(self, seeds=seeds, initialization=plan, lora=replace(self.lora, seeds=seeds))

    def recipe(self, stage: str, data: str) -> StageRecipe:
        """The recipe of a stage on a data set; raises ValueError for an unknown stage."""
        limits.named("stage", stage, self.stages)
        return self.vqa_sets.get(data, self.stages[stage]) if stage == "vqa" else self.stages[stage]

    def with_recipe(self, stage: str, **changes) -> "Profile":
        """The profile with other values in one stage's recipes; raises ValueError for an unknown stage."""
        stages = self.stages | {stage: replace(self.recipe(stage, ""), **changes)}
        sets = {name: replace(recipe, **changes) for name, recipe in self.vqa_sets.items()}
        return replace(self, stages=stages, vqa_sets=sets if stage == "vqa" else self.vqa_sets)


_BOTH = ("projector", "language_model")
_NOTE = {"": "chosen on the phantoms' validation split"}
_TINY_STAGE = StageRecipe(
    _BOTH, 5000, 4, 16, 1e-3, loss_tokens="response", padding="none", normalization="masked", times="stratified", sources=_NOTE
)
_TINY_ADAPT = {"tokens": 49_152, "length": 64, "batch_size": 4, "learning_rate": 2e-3}  # 192 steps an arm
_TINY_BENCH = {"hidden_size": 256, "intermediate_size": 768, "layers": 4, "heads": 4, "gen_length": 64, "block_length": 32}
TINY = Profile(
    name="tiny",
    purpose="any laptop CPU, no network, no weights: the default",
    model=ModelShape(
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
    ),
    stages={
        "align": replace(_TINY_STAGE, trains=("projector",), samples=4000, epochs=2, batch_size=32, learning_rate=2e-3),
        "instruct": replace(_TINY_STAGE, normalization="masked_sample", order="by_length"),
        "vqa": replace(_TINY_STAGE, samples=10_000, padding="fixed:8"),
    },
    pretrain={"tower_steps": 4500, "brief_steps": 2500, "short_steps": 1200}
    | {"all_steps": 2000, "general_steps": 600, "finish_steps": 1400},
    describe=SamplerSpec(gen_length=72, block_length=24, steps=72),
    answer=SamplerSpec(gen_length=8, block_length=8, steps=8),
    seeds=(0, 1, 2),
    evaluation_questions=600,
    evaluation_descriptions=100,
    # rates from a few short runs on validation questions
    lora=LoraPlan((64, 256, 1024), (90, 90, 90), {0: 1e-3, 2: 6e-3, 8: 3e-3, 32: 1.5e-3}, (0, 1, 2), 200, padded_steps=100),
    # far below a full stage 2, so that twelve trainings take minutes
    initialization=InitPlan(40, 90, (0, 1, 2), 32, 160, SamplerSpec(72, 24, 36), SamplerSpec(16, 16, 8), batch_size=8),
    adaptation=AdaptPlan(_TINY_ADAPT, (0, 1, 2), 32, 20, SamplerSpec(32, 32, 16), documents=4000),
    fast=FastPlan(SamplerSpec(64, 32, 64), 24, 32, 8, _TINY_BENCH | {"prompt_length": 200}),
    side_by_side=True,
)

_SMOKE_BENCH = {"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2, "gen_length": 8, "block_length": 4}
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
    lora=LoraPlan((8, 16), (1, 2), {0: 1e-3, 2: 1e-3}, (0, 1), 8, padded_steps=1),
    initialization=InitPlan(1, 1, (0, 1), 2, 8, SamplerSpec(16, 8, 4), SamplerSpec(8, 8, 4)),
    adaptation=AdaptPlan(_TINY_ADAPT | {"tokens": 512}, (0,), 4, 2, SamplerSpec(8, 8, 4), documents=200),
    fast=FastPlan(SamplerSpec(16, 8, 16), 8, 4, 2, _SMOKE_BENCH | {"vocab_size": 1000, "prompt_length": 12}),
    draws=8,
    band_steps=5,
    band_seeds=2,
)

_SMALL_STAGE = replace(
    _TINY_STAGE,
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
    padding="fixed:8",
    order="by_length",
    cached_vision=True,
    sources={"": "set by hand: benchmarks/small_gpu.py, which compares it with others, has not been run"},
)
_SMALL_TEXTS = replace(_SMALL_STAGE, samples=4000, epochs=3, batch_size=16, padding="none")
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
        "align": replace(_SMALL_TEXTS, trains=("projector",), epochs=2, learning_rate=1e-3, projector_rate=1.0),
        "instruct": _SMALL_TEXTS,
        "vqa": _SMALL_STAGE,
    },
    lora=LoraPlan((256, 1024), (112, 336), {0: 1e-4, 8: 1e-3, 32: 5e-4}, (0, 1, 2), 300, padded_steps=100),  # guessed rates
    initialization=InitPlan(100, 400, (0, 1, 2), 32, 200, SamplerSpec(96, 32, 48), SamplerSpec(16, 16, 8), batch_size=16),
    adaptation=AdaptPlan({"tokens": 2_000_000, "batch_size": 32}, (0,), 64, 20, SamplerSpec(64, 32, 64), self_tokens=1_000_000),
    side_by_side=False,
    notes="begins from pretrained towers, which `medv towers small` brings into runs/small/towers; meant for one GPU of "
    "16 GB, on a CPU it takes days; for real images put trainset.json, testset.json and images/ of VQA-RAD into a folder "
    "and run notebook 12 with data=vqa_rad and data_dir",
)

_LLADAV = "LLaDA-V's training script; the paper does not say"
_SOURCES = {
    "trains": "section 3 of the paper; vision tower frozen in all stages",
    **dict.fromkeys(("samples", "epochs", "batch_size", "warmup", "max_length"), "Table 6 of the paper"),
    "learning_rate": "LLaDA-V's script value, not confirmed for LLaDA-MedV: missing in the paper's text",
    **dict.fromkeys(("weight_decay", "projector_rate", "feature_dropout", "lower_case", "loss_tokens", "padding"), _LLADAV),
    "normalization": "Eq. 4 of the paper, in the form of the LLaDA guidelines",
    "times": "Eq. 1 of the paper: t is uniform, drawn for each sample",
    **dict.fromkeys(("checkpointing", "precision"), _LLADAV),
    **dict.fromkeys(("order", "cached_vision"), "medv's own: it changes cost, not the result"),
}
_PAPER_STAGE = StageRecipe(_BOTH, 1797, 2, 8, 1e-5, checkpointing=True, sources=_SOURCES)
_PLAIN = {"loss_tokens": "plain", "sources": _SOURCES | {"loss_tokens": "the reference's stage 1: image, caption, newline"}}
_PAPER_TOWER = {"hidden_size": 4096, "intermediate_size": 12288, "layers": 32, "heads": 32}
PAPER = Profile(
    name="paper",
    purpose="4 x 80 GB GPUs, network, released weights: the paper's own experiment",
    model=ModelShape(
        **_PAPER_TOWER,
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
        "align": replace(_PAPER_STAGE, trains=("projector",), samples=600_000, batch_size=32, learning_rate=1e-3, **_PLAIN),
        "instruct": replace(_PAPER_STAGE, samples=60_000, epochs=4),
        "vqa": _PAPER_STAGE,
    },
    vqa_sets={
        "slake": replace(_PAPER_STAGE, samples=4919, epochs=10),
        "pathvqa": replace(_PAPER_STAGE, samples=19_755, epochs=7),
    },
    pretrain={},
    describe=SamplerSpec(gen_length=256, block_length=64, steps=256),
    answer=SamplerSpec(gen_length=64, block_length=64, steps=64),
    seeds=(0,),
    evaluation_questions=451,
    evaluation_descriptions=193,
    lora=LoraPlan((112, 448, 1792), (56, 112, 448), {0: 1e-5, 8: 2e-4, 16: 2e-4, 64: 1e-4}, (0,), 451),  # guessed rates
    initialization=InitPlan(0, 0, (0,), 193, 0, SamplerSpec(256, 64, 256), SamplerSpec(64, 64, 64)),
    adaptation=None,
    fast=FastPlan(SamplerSpec(256, 64, 256), 64, 193, 32, _PAPER_TOWER | {"gen_length": 256, "dtype": "bfloat16"}),
    band_steps=0,
    synthetic=False,
    system="medical",
    dtype="bfloat16",
    towers="given",
)

PROFILES = {profile.name: profile for profile in (TINY, SMALL, PAPER, SMOKE)}


def get_profile(name: str) -> Profile:
    """The profile of that name; raises ValueError listing the names there are."""
    limits.named("profile", name, PROFILES)
    return PROFILES[name]
