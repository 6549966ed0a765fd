"""The phantom sets: balanced questions, disjoint splits, determinism, and the promised dialogues and words."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from medv.phantoms.questions import KINDS, ask, balanced_question, kinds_of, value_of
from medv.phantoms.scene import NORMAL, sample_scene
from medv.phantoms.sets import alignment_set, brief_set, description_set, general_set, instruct_set, text_set, vqa_set

pytestmark = pytest.mark.usefixtures("untouched_generators")


def hard_vqa_set(split, n, **options):
    return vqa_set(split, n, hard=True, **options)


SETS = [alignment_set, instruct_set, description_set, vqa_set, hard_vqa_set, general_set, text_set]


def said(examples):
    return [(e.id, e.turns, e.answer_type, e.meta["scene"], e.meta["kind"]) for e in examples]


def lookup_accuracy(train, test):
    """The best that a blind guesser can do: the most frequent training answer of the exact question text."""
    answers, overall = defaultdict(Counter), Counter()
    for example in train:
        answers[example.question][example.answer] += 1
        overall[example.answer] += 1
    guess = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    fallback = overall.most_common(1)[0][0]
    return np.mean([guess.get(example.question, fallback) == example.answer for example in test])


def of_type(examples, answer_type):
    return [example for example in examples if example.answer_type == answer_type]


@pytest.fixture(scope="module", params=[vqa_set, hard_vqa_set])
def questions(request):
    return request.param("train", 6000), request.param("test", 6000)


@pytest.mark.slow
def test_a_blind_guesser_gets_nothing_from_closed_questions(questions):
    train, test = (of_type(part, "CLOSED") for part in questions)
    assert len(test) == pytest.approx(3000, abs=20)
    assert lookup_accuracy(train, test) <= 0.53
    assert 0.48 <= np.mean([example.answer == "yes" for example in test]) <= 0.52


def test_every_closed_question_text_is_answered_yes_half_the_time():
    """Exactly, over whole blocks; any text of a phantom question is as often true as false."""
    answers = defaultdict(Counter)
    for example in of_type(vqa_set("train", 28 * 200), "CLOSED"):
        answers[example.question][example.answer] += 1
    assert all(counts["yes"] == counts["no"] for counts in answers.values())


def test_a_blind_guesser_gets_little_from_open_questions(questions):
    train, test = (of_type(part, "OPEN") for part in questions)
    assert lookup_accuracy(train, test) <= 0.45
    for kind in KINDS:
        answers = Counter(example.answer for example in test if example.meta["kind"] == kind)
        assert max(answers.values()) <= 1.1 * sum(answers.values()) / len(answers) + 60, (kind, answers)


@pytest.mark.slow
def test_closed_questions_are_blind_given_the_modality_too():
    """Knowing the domain of the picture beside the question must not help either, except to tell the modality."""
    answers = defaultdict(Counter)
    for example in of_type(vqa_set("train", 28 * 500), "CLOSED"):
        kind, scene = example.meta["kind"], example.meta["scene"]
        if kind != "modality":
            answers[kind, scene.domain][example.answer] += 1
    for key, counts in answers.items():
        assert abs(counts["yes"] / sum(counts.values()) - 0.5) < 0.12, (key, counts)


def test_open_questions_do_not_name_the_domain_or_the_finding(questions):
    words = re.compile(r"x-ray|CT|MRI|histology|gross|scan|specimen|nodule|tumor|cyst|portable|T1|contrast")
    for example in of_type(questions[1], "OPEN"):
        assert not words.search(example.question), example.question


def test_answers_are_true(questions):
    for example in questions[1]:
        scene, kind = example.meta["scene"], example.meta["kind"]
        if example.answer_type == "OPEN" and kind != "modality":
            assert example.answer == value_of(scene, kind)
        if kind in ("side", "level", "size"):
            assert scene.finding != NORMAL


def test_main_questions_have_one_polarity_and_hard_questions_both():
    def words(examples, kind):
        texts = {e.question for e in of_type(examples, "CLOSED") if e.meta["kind"] == kind}
        return set(re.findall(r"[\w-]+", " ".join(texts)))

    main, hard = vqa_set("train", 3000), hard_vqa_set("train", 3000)
    for kind, asked, other in [
        ("side", "left", "right"),
        ("level", "upper", "lower"),
        ("level", "anterior", "posterior"),
        ("size", "large", "small"),
        ("acquisition", "portable", "upright"),
        ("acquisition", "T2", "T1"),
        ("abnormal", "abnormality", "normal"),
    ]:
        assert asked in words(main, kind) and other not in words(main, kind), kind
        assert {asked, other} <= words(hard, kind), kind


def test_half_of_the_questions_are_closed_and_all_kinds_are_asked():
    examples = vqa_set("validation", 28 * 20)
    assert Counter(e.answer_type for e in examples) == {"CLOSED": 280, "OPEN": 280}
    assert Counter(e.meta["kind"] for e in examples) == dict.fromkeys(KINDS, 80)


@pytest.mark.slow
@pytest.mark.parametrize("closed_set", [general_set, text_set])
def test_the_closed_questions_of_other_sets_are_balanced_too(closed_set):
    examples = of_type(closed_set("train", 8000), "CLOSED")
    yes = np.mean([example.answer.lower().startswith("yes") for example in examples])
    assert len(examples) > 1000 and 0.47 <= yes <= 0.53


@pytest.mark.slow
def test_questions_of_dialogues_are_balanced():
    yes = Counter()
    for example in instruct_set("train", 6000):
        for turn in example.turns:
            if turn.role == "assistant" and turn.text.startswith(("Yes,", "No,")):
                yes[turn.text[:2]] += 1
    assert 0.46 <= yes["Ye"] / sum(yes.values()) <= 0.54


@pytest.mark.parametrize("make", SETS)
def test_sets_are_deterministic_and_prefix_stable(make):
    assert said(make("train", 60)) == said(make("train", 200))[:60]
    assert said(make("train", 60)) != said(make("test", 60))
    assert said(make("train", 60)) != said(make("train", 60, seed=1))


def test_no_image_is_in_two_sets_or_splits():
    seen = set()
    for make in SETS[:-2]:
        for split in ("train", "validation", "test"):
            seeds = {example.meta["scene"].seed for example in make(split, 200)}
            assert len(seeds) == 200 and not seeds & seen
            seen |= seeds


def test_ids_are_unique_over_sets_splits_and_seeds():
    ids = [e.id for make in SETS for split in ("train", "test") for seed in (0, 1) for e in make(split, 50, seed=seed)]
    assert len(ids) == len(set(ids))


def test_dialogues_have_one_to_four_question_answer_turns():
    examples = instruct_set("train", 2000)
    counts = Counter(len(example.turns) // 2 for example in examples)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 100
    assert 0.45 < np.mean([example.meta["kind"] == "description" for example in examples]) < 0.55
    for example in examples:
        assert [turn.role for turn in example.turns] == ["user", "assistant"] * (len(example.turns) // 2)


def test_text_examples_carry_their_facts_in_words():
    examples = text_set("train", 400)
    assert all(example.image is None for example in examples)
    for example in examples:
        assert example.question.startswith("Tags: ") == (example.meta["kind"] != "report")
        scene = example.meta["scene"]
        if example.meta["kind"] in ("caption", "description") and hasattr(scene, "finding"):
            assert scene.finding in example.question and scene.acquisition in example.question


def test_a_brief_answer_can_be_read_off_the_tags_and_not_off_the_question():
    examples = brief_set("train", 560)
    for example in examples:
        assert example.image is None and example.question.startswith("Tags: ") and len(example.turns) == 2
        if example.answer_type == "OPEN" and example.meta["kind"] not in ("abnormal",):
            assert example.answer in example.question.partition("\n")[0]
    closed = [example.answer for example in examples if example.answer_type == "CLOSED"]
    assert len(closed) < len(examples) / 3 and 0.4 < closed.count("yes") / len(closed) < 0.6


def test_images_are_drawn_on_call_at_the_wanted_size():
    for make in SETS[:-1]:
        image = make("test", 1, image_size=32)[0].image()
        assert image.size == (32, 32) and image.mode == "RGB"


@pytest.mark.slow
def test_the_whole_vocabulary_is_small():
    words = set()
    for make in SETS:
        for example in make("train", 1500):
            for turn in example.turns:
                words.update(re.findall(r"[\w-]+", turn.text.lower()))
    assert 200 < len(words) <= 650


def test_follow_up_questions_fit_their_scene():
    normal, ill = sample_scene(1, finding=NORMAL), sample_scene(2, finding="tumor")
    assert kinds_of(normal) == ("modality", "abnormal", "acquisition") and kinds_of(ill) == KINDS
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no side"):
        ask(normal, "side", "open", rng)
    with pytest.raises(ValueError, match="unknown kind"):
        ask(ill, "color", "open", rng)
    with pytest.raises(ValueError, match="unknown form"):
        ask(ill, "side", "shut", rng)
    for kind in KINDS:
        for form in ("open", "closed"):
            question = ask(ill, kind, form, rng)
            assert question.scene is ill and question.sentence.endswith(".") and question.text.endswith("?")
            if form == "closed":
                assert question.sentence.startswith(question.answer.capitalize())


def test_a_question_is_a_function_of_its_index():
    assert balanced_question(77, salt=3, scene_seed=9) == balanced_question(77, salt=3, scene_seed=9)


def test_impossible_wishes_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="unknown split"):
        vqa_set("dev", 3)
    with pytest.raises(ValueError, match="cannot be made"):
        vqa_set("train", -1)
