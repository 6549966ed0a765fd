"""Estimates how long the notebooks of a profile take on this machine: counted work times measured seconds.

Counted are examples learned from, forwards of one answer each, and pictures drawn; one of each is timed on a network of the
profile's sizes with random weights. A notebook without an entry takes minutes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from medv.checkpoints.assembly import random_model
from medv.companion.bench.machine import bench_device, timed
from medv.companion.studies import (
    adaptation,
    attribution,
    chosen_length,
    confidence,
    generation,
    infilling,
    initialization,
    less_repetition,
    loss_band,
)
from medv.companion.studies import repetition as repetition_study
from medv.companion.studies.fast_sampling import ON_MODEL
from medv.data.chat import SpecialTokens
from medv.data.example import load_image
from medv.evaluation.attribution import MOST
from medv.phantoms.sets import description_set
from medv.profiles import Profile

PROMPT, MANY = 64, 16
FROZEN = 2 / 3  # of a training step, where the language tower's weights get no gradient


@dataclass(frozen=True)
class Work:
    """learned: examples, each as often as it is seen; asked: forwards of an answer; drawn: pictures. Or seconds of one each."""

    learned: float = 0.0
    asked: float = 0.0
    drawn: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.learned + other.learned, self.asked + other.asked, self.drawn + other.drawn)

    def seconds(self, unit: "Work") -> float:
        """How long this takes where one of each takes `unit`."""
        return self.learned * unit.learned + self.asked * unit.asked + self.drawn * unit.drawn


def work_of(notebook: str, profile: Profile) -> Work:
    """The work of a notebook by the name of its node, on phantoms; none for those that take minutes."""
    return _COUNTS[notebook](profile) if notebook in _COUNTS else Work()


def _stage1(profile: Profile) -> Work:
    recipe, texts = profile.stages["align"], profile.evaluation_descriptions
    return Work(FROZEN * recipe.samples * recipe.epochs, 2 * texts * 32, recipe.samples + texts)


def _stage2(profile: Profile) -> Work:
    recipe, texts = profile.stages["instruct"], profile.evaluation_descriptions
    return Work(recipe.samples * recipe.epochs, 1.25 * texts * profile.describe.steps, recipe.samples + texts)


def _stage3(profile: Profile) -> Work:
    recipe, seeds, conditions = profile.stages["vqa"], len(profile.seeds), 2.5
    asked = 2 * profile.evaluation_questions * profile.answer.steps * conditions
    return Work(seeds * recipe.samples * recipe.epochs, seeds * asked, seeds * recipe.samples)


def _lora(profile: Profile) -> Work:
    plan, batch = profile.lora, profile.stages["vqa"].batch_size
    arms, start = len(plan.rates) * len(plan.seeds), plan.padded_steps * profile.stages["instruct"].batch_size
    asked = arms * len(plan.sizes) * plan.questions * profile.answer.steps
    return Work(start + arms * sum(plan.steps) * batch, asked, start + arms * (sum(plan.sizes) + plan.questions))


def _initialization(profile: Profile) -> Work:
    plan = profile.initialization
    trials = len(plan.seeds) * (len(initialization.ARMS) if profile.towers == "bundled" else 2)
    batch = plan.batch_size or profile.stages["instruct"].batch_size
    learned = batch * (FROZEN * plan.align_steps + plan.instruct_steps)
    asked = plan.descriptions * plan.describe.steps + plan.questions * plan.answer.steps
    drawn = batch * (plan.align_steps + plan.instruct_steps) + plan.descriptions + plan.questions
    return Work(trials * learned, trials * asked, trials * drawn)


def _adaptation(profile: Profile) -> Work:
    plan, row = adaptation.plan_of(profile), PROMPT + profile.model.image_tokens + 32
    arms = len(adaptation.arms_of(plan)) * len(plan.seeds)
    asked = arms * plan.openings * plan.write.steps + plan.self_tokens / (PROMPT + profile.describe.gen_length)
    return Work(7 / 6 * arms * plan.recipe["tokens"] / row, asked)  # half of the arms also run a teacher


def _loss_band(profile: Profile) -> Work:
    trials = loss_band.trials_of(profile).values()
    return Work(sum(trial.steps * trial.batch_size for trial in trials), 0, profile.band_steps * loss_band.BATCH)


def _conversation(profile: Profile) -> Work:
    questions, systems = min(193, 2 * profile.evaluation_descriptions), 3
    return Work(0, systems * questions * generation.canvas_of(profile)[0], systems * questions)


def _settings(profile: Profile) -> Work:
    configs = generation.plain_configs(generation.table5_settings(profile)).values()
    return _answered(profile, [config.steps for config in configs], 1.0)


def _repetition(profile: Profile) -> Work:
    sweep = repetition_study.sweep_settings(profile).drop_duplicates("setting")["steps"]
    schedules = repetition_study.schedule_configs(profile)[0].values()
    return _answered(profile, [*sweep, *(config.steps for config in schedules)], 1 / 3)


def _chosen_length(profile: Profile) -> Work:
    learned, forwards, share_of = 0, 0.0, chosen_length.share_of
    for arm in chosen_length.trials_of(profile).values():
        learned += arm.examples
        forwards += sum(share_of(arm.arm, way) * c.steps for way, c in chosen_length.ways_of(arm, 0.5).items())
    requests = len(profile.seeds) * profile.evaluation_descriptions
    return Work(learned, requests * forwards, learned + requests)


def _less_repetition(profile: Profile) -> Work:
    main, other = (configs(profile).values() for configs in (less_repetition.main_configs, less_repetition.other_configs))
    few = [config.steps for config in other]
    watched = [steps for _ in less_repetition.WATCHED for steps in less_repetition.canvas_and_steps(profile)[1][:-1]]
    return _answered(profile, [config.steps for config in main], 1.0) + _answered(profile, few + watched, 1 / 3)


def _infilling(profile: Profile) -> Work:
    texts = infilling.TEXTS * profile.evaluation_descriptions
    forwards = len(infilling.KINDS) * len(infilling.MODELS) * 2 * 1.5  # own and another image; words of one or two tokens
    return Work(0, texts * forwards, 2 * texts)


def _confidence(profile: Profile) -> Work:
    answers = len(profile.seeds) * 2 * profile.evaluation_questions
    return Work(0, answers * sum(confidence.steps_of(profile.answer.gen_length)), 2 * profile.evaluation_questions)


def _answered(profile: Profile, steps: list[int], share: float) -> Work:
    requests = len(profile.seeds) * max(2, round(share * profile.evaluation_descriptions))
    return Work(0, requests * sum(steps), requests * len(steps))


def _fast(profile: Profile) -> Work:
    sizes, length = profile.fast, profile.describe.gen_length
    asked = sizes.descriptions * len(ON_MODEL) * length * (1 / 8 + 1 / 4 + 1 / 2) + 8 * sizes.cached * length
    return Work(0, asked, sizes.descriptions)


def _attribution(profile: Profile) -> Work:
    if not profile.synthetic:
        return Work()
    lesions, compared = (profile.evaluation_descriptions * share for share in (attribution.LESIONS, 1))
    regions = min(profile.model.image_tokens, MOST**2) + 1
    maps = (lesions + compared) * len(attribution.KINDS) * 1.2  # tokens a word
    return Work(0, lesions * len(attribution.KINDS) * profile.sentence.steps + maps * regions, lesions * (regions + 2))


_COUNTS: dict[str, Callable[[Profile], Work]] = {
    "stage1": _stage1,
    "stage2": _stage2,
    "stage3": _stage3,
    "lora": _lora,
    "initialization": _initialization,
    "adaptation": _adaptation,
    "loss_band": _loss_band,
    "open_conversation": _conversation,
    "length_control": _conversation,
    "chosen_length": _chosen_length,
    "generation_settings": _settings,
    "repetition": _repetition,
    "less_repetition": _less_repetition,
    "infilling": _infilling,
    "confidence": _confidence,
    "fast_sampling": _fast,
    "attribution": _attribution,
}


def measure(profile: Profile) -> Work:
    """Seconds of one of each here, the second time: an example of a training step, a forward of one answer, a picture
    drawn and seen by the vision tower.
    """
    device = bench_device(None)
    rows = MANY if device.type == "cuda" else 2
    model = random_model(profile.model, SpecialTokens(*range(7)), seed=0).to(device).train()
    model.model.vision_tower.requires_grad_(False)
    size, length = profile.model.image_size, PROMPT + profile.model.image_tokens
    ids = torch.full((rows, length + profile.describe.gen_length), 9, device=device)
    pixels = torch.zeros(rows, 3, size, size, device=device)
    example = description_set("test", 1, image_size=size)[0]
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()

    def learn() -> None:
        model(input_ids=ids[:, : length + 32], labels=ids[:, : length + 32]).loss.backward()

    @torch.no_grad()
    def ask() -> None:
        model(input_ids=ids, logits_to_keep=slice(length, None))

    @torch.no_grad()
    def look() -> None:
        model.model.look(pixels)

    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        learned, asked, looked = ([timed(step, device)[0] for _ in range(2)][1] / rows for step in (learn, ask, look))
    drawn = [timed(lambda: load_image(example), device)[0] for _ in range(2)][1]
    return Work(learned, asked, looked + drawn)
