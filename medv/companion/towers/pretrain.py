"""Making the bundled tiny weights: `medv train pretrain`.

Four things stand for what the paper downloads: a tokenizer and a text-trained language tower (the role of LLaDA-8B-Instruct),
a vision tower (the role of SigLIP2) and a general-domain vision-language model (the role of LLaDA-V). A fifth, the finished
tiny model, was tuned from the towers on short questions and then on questions, captions and dialogues together, so that
`medv ask` answers right after install. The last is the language tower of the autoregressive twin: causal, trained on the next
token of the same texts in the same order. Every part is a folder that is made whole or not at all; a run that was stopped
goes on with the next part.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from medv import limits
from medv.artifacts import atomic_directory, write_json
from medv.checkpoints.assembly import assemble, new_processor, random_model
from medv.checkpoints.loading import load_tokenizer
from medv.companion.towers.tokenizer import train_tokenizer
from medv.companion.towers.vision import train_tower
from medv.data.chat import SpecialTokens
from medv.data.example import Example
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.twin import causal_twin, language_tower
from medv.ownership import Run, check_folder
from medv.phantoms.sets import alignment_set, brief_set, general_set, instruct_set, text_set, vqa_set
from medv.profiles import Profile, StageRecipe
from medv.training.launch import stopping_in_words
from medv.training.stages import claimed, train_stage
from medv.training.twin import causal_recipe

PART = "part.json"  # written last
BRIEF_HELD = 4000  # questions of the first phase that are kept for looking at what it taught
PARTS = ("tokenizer", "vision_tower", "language_tower", "general_model", "tiny_model", "twin_tower")


def pretrain(profile: Profile, out: Path, *, seed: int = 0, only: Sequence[str] = PARTS, quiet: bool = False) -> None:
    """Make the bundled parts in `out`; parts that are there are kept. `only` names the parts to make.

    When all are there, `out/weights` holds them in half precision, as the package carries them in `medv/weights`. Raises
    ValueError where `out` holds anything else than parts of this profile and seed, TrainingStopped as `train_stage` does.
    """
    limits.seed("seed", seed)
    if not profile.pretrain:
        raise ValueError(f"profile {profile.name} begins from towers trained elsewhere: only tiny and smoke train their own")
    unknown = set(only) - set(PARTS)
    if unknown:
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    makers = {
        "tokenizer": _make_tokenizer,
        "vision_tower": _make_vision_tower,
        "language_tower": _make_language_tower,
        "general_model": _make_general_model,
        "tiny_model": _make_tiny_model,
        "twin_tower": _make_twin_tower,
    }
    run = _made_of(profile, seed)
    exported = set(only) != set(PARTS) or (out / "weights").exists()
    if exported and all((out / part / PART).exists() for part in only):
        check_folder(out, run)  # without a lock, so that those who only use the parts do not meet
    else:
        with stopping_in_words(lambda: "the same command goes on"), claimed(out, run):
            for part in (part for part in PARTS if part in only and not (out / part / PART).exists()):
                facts = makers[part](profile, out, seed, quiet)
                shutil.rmtree(out / part / "checkpoints", ignore_errors=True)
                write_json(out / part / PART, {"profile": profile.to_dict(), "seed": seed, **facts})
            if all((out / part / PART).exists() for part in PARTS):
                export_half(out, out / "weights")


def _made_of(profile: Profile, seed: int) -> Run:
    """What decides the parts, for `medv.ownership`."""
    stages = {name: recipe.settings() for name, recipe in profile.stages.items()}
    shape = {"model": asdict(profile.model), "stages": stages, "steps": profile.pretrain, "system": profile.system}
    return {"made_by": "medv train pretrain", "profile": profile.name, "seed": seed, **shape}


def text_recipes(profile: Profile) -> dict[str, StageRecipe]:
    """The three phases of the text stage, all of the language tower alone: one-word answers, then sentences, then everything.

    Whole reports first is the slow way: a word like "left" is one of seventy, its two values are told apart by nothing
    else, and their embeddings collapse into one long before the model learns to read them off the prompt.
    """
    base = replace(profile.stages["instruct"], trains=("language_model",), samples=0, epochs=1, batch_size=16)
    return {
        "brief": replace(base, learning_rate=1e-3, normalization="masked", padding="fixed:8"),
        "short": replace(base, learning_rate=1.5e-3, normalization="masked"),
        "all": replace(base, learning_rate=1.5e-3),
    }


def mixture(profile: Profile, split: str, count: int) -> list[Example]:
    """Dialogues, captions and questions in one set: what the finished tiny model is trained on."""
    size = profile.model.image_size
    parts = (
        instruct_set(split, count // 2, image_size=size),
        alignment_set(split, count // 8, image_size=size),
        vqa_set(split, count - count // 2 - count // 8, image_size=size),
    )
    return [example for part in parts for example in part]


def _texts(count: int) -> Iterator[str]:
    for maker in (text_set, instruct_set, vqa_set, alignment_set, general_set):
        for example in maker("train", count):
            yield from (turn.text for turn in example.turns)
    yield from ("user", "assistant", "system", "\n\n") * 50


def _make_tokenizer(profile: Profile, out: Path, seed: int, quiet: bool) -> dict:
    tokenizer = train_tokenizer(_texts(profile.pretrain.get("texts", 4000)), profile.model.vocab_size)
    tokenizer.save_pretrained(out / "tokenizer")
    return {"tokens": len(tokenizer)}


def _make_vision_tower(profile: Profile, out: Path, seed: int, quiet: bool) -> dict:
    options = {"steps": profile.pretrain["tower_steps"], "images": profile.pretrain.get("tower_images", 36_000)}
    return {"accuracy": train_tower(profile.model, out / "vision_tower", seed=seed, quiet=quiet, **options)}


def _tokenizer(out: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(out / "tokenizer")


def _make_language_tower(profile: Profile, out: Path, seed: int, quiet: bool) -> dict:
    return _text_stage(profile, out, "language_tower", seed, quiet)


def _make_twin_tower(profile: Profile, out: Path, seed: int, quiet: bool) -> dict:
    return _text_stage(profile, out, "twin_tower", seed, quiet, causal=True)


def _text_stage(profile: Profile, out: Path, part: str, seed: int, quiet: bool, *, causal: bool = False) -> dict:
    tokenizer, target = _tokenizer(out), out / part
    shape = replace(profile.model, vocab_size=len(tokenizer))
    model = random_model(shape, SpecialTokens.of(tokenizer), seed=seed)
    model = causal_twin(model) if causal else model
    processor = new_processor(tokenizer, model.config)
    recipes = text_recipes(profile)
    steps = {phase: profile.pretrain[f"{phase}_steps"] for phase in recipes}
    validation = text_set("validation", 64)
    for phase, recipe in recipes.items():
        work = target / "checkpoints" / phase
        examples = text_examples(phase, steps[phase] * recipe.batch_size)
        recipe = causal_recipe(recipe) if causal else recipe
        model = train_stage(model, processor, recipe, examples, work, validation=validation, seed=seed, quiet=quiet)
    language_tower(model).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {"steps": steps}


def text_examples(phase: str, count: int) -> list[Example]:
    """The training examples of a phase of the text stage; "short" are those with one answer of at most thirty words."""
    if phase == "brief":
        return brief_set("train", BRIEF_HELD + count, seed=5)[BRIEF_HELD:]
    if phase == "all":
        return text_set("train", count, seed=1)
    examples = text_set("train", 2 * count)
    return [ex for ex in examples if len(ex.turns) == 2 and len(ex.answer.split()) <= 30][:count]


def _stages(
    profile: Profile, out: Path, name: str, sets: dict[str, list[Example]], seed: int, quiet: bool
) -> MedVForMaskedDiffusion:
    """Run stages one after another from the towers; the last one's model is saved under `name`."""
    model = assemble(out / "language_tower", out / "vision_tower", seed=seed, **profile.model.sight)
    processor = new_processor(_tokenizer(out), model.config, system=profile.system)
    for stage, examples in sets.items():
        work = out / name / "checkpoints" / stage
        model = train_stage(model, processor, profile.stages[stage], examples, work, seed=seed, quiet=quiet)
    model.save_pretrained(out / name)
    processor.save_pretrained(out / name)
    return model


def _make_general_model(profile: Profile, out: Path, seed: int, quiet: bool) -> dict:
    size, steps = profile.model.image_size, profile.pretrain["general_steps"]
    count = steps * profile.stages["instruct"].batch_size // int(profile.stages["instruct"].epochs)
    examples = general_set("train", max(count, 8), image_size=size)
    sets = {"align": examples[: max(len(examples) // 4, 8)], "instruct": examples}
    _stages(profile, out, "general_model", sets, seed, quiet)
    return {"examples": len(examples)}


def _make_tiny_model(profile: Profile, out: Path, seed: int, quiet: bool) -> dict:
    size, base = profile.model.image_size, profile.stages["instruct"]
    finish = replace(base, samples=0, epochs=1, padding="fixed:64")  # short answers learn to end on a long canvas
    profile = replace(profile, stages={**profile.stages, "instruct": finish})
    sets = {
        "vqa": vqa_set("train", profile.stages["vqa"].samples, image_size=size),
        "instruct": mixture(profile, "train", profile.pretrain["finish_steps"] * base.batch_size),
    }
    _stages(profile, out, "tiny_model", sets, seed, quiet)
    return {"examples": {stage: len(examples) for stage, examples in sets.items()}}


def export_half(source: Path, target: Path) -> None:
    """Copy the parts with their weights in float16, half the bytes; they are loaded as float32 again."""
    with atomic_directory(target) as folder:
        for part in PARTS:
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
            for file in (folder / part).glob("*.safetensors"):
                tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
                save_file(tensors, file, metadata={"format": "pt"})
