"""Making the bundled tiny weights: `medv train pretrain`.

A tokenizer and a text-trained language tower stand for LLaDA-8B-Instruct, a vision tower for SigLIP2, a general-domain model
for LLaDA-V. The tiny model is tuned from the towers, so that `medv ask` answers right after install; the twin's tower is
causal, trained on the same texts in the same order. A part is made whole or not at all; a stopped run continues with the next.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from medv import limits
from medv.artifacts import atomic_directory, write_json
from medv.checkpoints.assembly import assemble, new_processor, random_model
from medv.checkpoints.card import open_weights
from medv.checkpoints.loading import load_tokenizer
from medv.companion.towers.tokenizer import train_tokenizer
from medv.companion.towers.twin import causal_recipe
from medv.companion.towers.vision import train_tower
from medv.data.chat import SpecialTokens
from medv.data.example import Example
from medv.model.twin import causal_twin, language_tower
from medv.ownership import check_folder
from medv.phantoms.sets import alignment_set, brief_set, general_set, instruct_set, text_set, vqa_set
from medv.profiles import Profile, StageRecipe
from medv.training.launch import RunOptions, clear_failures
from medv.training.stages import claimed, train_stages

PART = "part.json"  # written last
BRIEF_HELD = 4000  # questions of the first phase that are held out, to examine what it taught


def pretrain(profile: Profile, out: Path, *, seed: int = 0, only: Sequence[str] | None = None, quiet: bool = False) -> None:
    """Make the bundled parts in `out`; existing parts are kept. `only` names the parts to make, None is all of PARTS.

    When all exist, `out/weights` holds them in half precision, as the package carries them in `medv/weights`. Raises ValueError
    where `out` holds anything but parts of this profile and seed, TrainingStopped as `train_stage` does.
    """
    limits.seed("seed", seed)
    if not profile.pretrain:
        raise ValueError(f"profile {profile.name} begins from towers trained elsewhere: only tiny and smoke train their own")
    wanted = PARTS if only is None else only
    if unknown := set(wanted) - set(PARTS):
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    stages = {name: recipe.settings() for name, recipe in profile.stages.items()}
    run = {"made_by": "medv train pretrain", "profile": profile.name, "seed": seed, "model": asdict(profile.model)}
    run |= {"stages": stages, "steps": profile.pretrain, "system": profile.system}
    missing = [part for part in PARTS if part in wanted and not (out / part / PART).exists()]
    exported = set(wanted) != set(PARTS) or (out / "weights").exists()
    if exported and not missing:
        check_folder(out, run)  # without a lock, so that concurrent readers of the parts do not collide
        return
    with clear_failures(lambda: "the same command goes on"), claimed(out, run):
        for part in missing:
            facts = PARTS[part](profile, out, RunOptions(seed=seed, quiet=quiet))
            shutil.rmtree(out / part / "checkpoints", ignore_errors=True)
            write_json(out / part / PART, {"profile": profile.to_dict(), "seed": seed, **facts})
        if all((out / part / PART).exists() for part in PARTS):
            _export_half(out, out / "weights")


def _make_tokenizer(profile: Profile, out: Path, options: RunOptions) -> dict:
    def texts(count: int) -> Iterator[str]:
        for maker in (text_set, instruct_set, vqa_set, alignment_set, general_set):
            for example in maker("train", count):
                yield from (turn.text for turn in example.turns)
        yield from ("user", "assistant", "system", "\n\n") * 50

    tokenizer = train_tokenizer(texts(profile.pretrain.get("texts", 4000)), profile.model.vocab_size)
    tokenizer.save_pretrained(out / "tokenizer")
    return {"tokens": len(tokenizer)}


def _make_vision_tower(profile: Profile, out: Path, options: RunOptions) -> dict:
    steps, images = profile.pretrain["tower_steps"], profile.pretrain.get("tower_images", 36_000)
    return {"accuracy": train_tower(profile.model, out / "vision_tower", options, steps=steps, images=images)}


def _make_text_tower(profile: Profile, out: Path, options: RunOptions, *, part: str = "language_tower") -> dict:
    """Train the language tower alone, in three phases: one-word answers, then sentences, then everything.

    Whole reports first is the slow way: a word like "left" is one of seventy, nothing else tells its two values apart, and
    their embeddings collapse into one long before the model learns to read them off the prompt.
    """
    tokenizer, target, causal = load_tokenizer(out / "tokenizer"), out / part, part == "twin_tower"
    shape = replace(profile.model, vocab_size=len(tokenizer))
    model = random_model(shape, SpecialTokens.of(tokenizer), seed=options.seed)
    model = causal_twin(model) if causal else model
    base = replace(profile.stages["instruct"], trains=("language_model",), samples=0, epochs=1, batch_size=16)
    recipes = {
        "brief": replace(base, learning_rate=1e-3, normalization="masked", padding="fixed:8"),
        "short": replace(base, learning_rate=1.5e-3, normalization="masked"),
        "all": replace(base, learning_rate=1.5e-3),
    }
    steps = {phase: profile.pretrain[f"{phase}_steps"] for phase in recipes}
    validation, stages = text_set("validation", 64), {}
    for phase, recipe in recipes.items():
        examples = _text_examples(phase, steps[phase] * recipe.batch_size)
        stages[phase] = (causal_recipe(recipe) if causal else recipe, examples, validation)
    model = train_stages(model, new_processor(tokenizer, model.config), stages, target / "checkpoints", options)
    language_tower(model).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {"steps": steps}


def _text_examples(phase: str, count: int) -> list[Example]:
    """The training examples of a phase; "short" are those with one answer of at most thirty words."""
    if phase == "brief":
        return brief_set("train", BRIEF_HELD + count, seed=5)[BRIEF_HELD:]
    if phase == "all":
        return text_set("train", count, seed=1)
    examples = text_set("train", 2 * count)
    return [ex for ex in examples if len(ex.turns) == 2 and len(ex.answer.split()) <= 30][:count]


def _make_general_model(profile: Profile, out: Path, options: RunOptions) -> dict:
    recipes = profile.stages
    count = profile.pretrain["general_steps"] * recipes["instruct"].batch_size // int(recipes["instruct"].epochs)
    examples = general_set("train", max(count, 8), image_size=profile.model.image_size)
    first = examples[: max(len(examples) // 4, 8)]
    stages = {"align": (recipes["align"], first, ()), "instruct": (recipes["instruct"], examples, ())}
    _train_from_towers(profile, out, "general_model", stages, options)
    return {"examples": len(examples)}


def _make_tiny_model(profile: Profile, out: Path, options: RunOptions) -> dict:
    size, base, recipe = profile.model.image_size, profile.stages["instruct"], profile.stages["vqa"]
    finish = replace(base, samples=0, epochs=1, padding="fixed:64")  # short answers learn to end on a long canvas
    count = profile.pretrain["finish_steps"] * base.batch_size
    mixture = [
        *instruct_set("train", count // 2, image_size=size),
        *alignment_set("train", count // 8, image_size=size),
        *vqa_set("train", count - count // 2 - count // 8, image_size=size),
    ]
    stages = {"vqa": (recipe, vqa_set("train", recipe.samples, image_size=size), ()), "instruct": (finish, mixture, ())}
    _train_from_towers(profile, out, "tiny_model", stages, options)
    return {"examples": {stage: len(examples) for stage, (_, examples, _) in stages.items()}}


def _train_from_towers(
    profile: Profile, out: Path, part: str, stages: dict[str, tuple[StageRecipe, list[Example], tuple]], options: RunOptions
) -> None:
    """Run stages one after another from the towers; the last model is saved as the part."""
    model = assemble(out / "language_tower", out / "vision_tower", seed=options.seed, **profile.model.sight)
    processor = new_processor(load_tokenizer(out / "tokenizer"), model.config, system=profile.system)
    model = train_stages(model, processor, stages, out / part / "checkpoints", options)
    model.save_pretrained(out / part)
    processor.save_pretrained(out / part)


PARTS = {
    "tokenizer": _make_tokenizer,
    "vision_tower": _make_vision_tower,
    "language_tower": _make_text_tower,
    "general_model": _make_general_model,
    "tiny_model": _make_tiny_model,
    "twin_tower": partial(_make_text_tower, part="twin_tower"),
}
"""The parts and their makers, in the order in which they are made."""


def _export_half(source: Path, target: Path) -> None:
    """Copy the parts with their weights in float16, half the bytes; they are loaded as float32 again."""
    with atomic_directory(target) as folder:
        for part in PARTS:
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
            for file in (folder / part).glob("*.safetensors"):
                tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
                save_file(tensors, file, metadata={"format": "pt"})
            open_weights(folder / part)
