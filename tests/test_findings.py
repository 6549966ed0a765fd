"""The offline judge: it reads every reference perfectly, and it does not forgive."""

import numpy as np
import pytest

from medv.phantoms.facts import score_description, score_descriptions, stated_facts
from medv.phantoms.scene import ACQUISITIONS, DOMAINS, FINDINGS, LEVELS, NORMAL, SIDES, SIZES, sample_scene
from medv.phantoms.wording import caption, description

SCENES = [sample_scene(seed) for seed in range(2000)]
NODULE = sample_scene(
    1, domain="chest_xray", finding="nodule", side="left", level="upper", size="small", acquisition="portable"
)
PERFECT = "A portable chest x-ray. There is a small nodule in the left upper lung. There is no pneumothorax or consolidation."


def rng(seed):
    return np.random.default_rng([seed, 2])


@pytest.mark.slow
@pytest.mark.parametrize("write", [caption, description])
def test_the_references_are_read_exactly(write):
    for scene in SCENES:
        text = write(scene, rng(scene.seed))
        assert stated_facts(text) == scene.facts(), text
        assert score_description(text, scene).f1 == 1.0


@pytest.mark.slow
def test_the_references_of_other_scenes_score_far_lower():
    texts = [description(scene, rng(scene.seed)) for scene in SCENES[:500]]
    shuffled = score_descriptions(texts[1:] + texts[:1], SCENES[:500])
    assert shuffled.f1 < 0.45
    assert score_descriptions(texts, SCENES[:500]).f1 == 1.0


@pytest.mark.slow
def test_every_single_changed_fact_is_penalized():
    """Write of a scene that differs in one fact: one claim is wrong and one fact is missing."""
    for scene in SCENES[:500]:
        values = {name: value for name, value in scene.facts()}
        if scene.finding == NORMAL:
            continue
        options = {
            "finding": FINDINGS[scene.domain],
            "side": SIDES,
            "level": LEVELS[scene.domain],
            "size": SIZES,
            "acquisition": ACQUISITIONS[scene.domain],
        }
        for name, choices in options.items():
            other = next(value for value in choices if value != values[name])
            wrong = sample_scene(scene.seed, **(values | {name: other}))
            score = score_description(description(wrong, rng(scene.seed)), scene)
            assert score.precision == score.recall == score.f1 == pytest.approx(5 / 6)
            assert (name, other) in score.stated - score.correct


def test_an_invented_second_finding_lowers_precision_only():
    score = score_description(PERFECT + " There is also a pleural effusion.", NODULE)
    assert score_description(PERFECT, NODULE).f1 == 1.0
    assert score.recall == 1.0 and score.precision == pytest.approx(6 / 7)


def test_contradictions_do_not_pay():
    both = score_description("Small and large nodule, left and right, upper and lower, portable and upright x-ray.", NODULE)
    assert both.recall == 1.0 and both.precision == pytest.approx(6 / 10)
    assert ("finding", NORMAL) in stated_facts(PERFECT + " The image is normal.")


@pytest.mark.parametrize("text", ["", "   ", "the the of and", "There is no pneumothorax.", "?!"])
def test_text_that_claims_nothing_scores_zero(text):
    score = score_description(text, NODULE)
    assert score.stated == frozenset() and score.f1 == score.precision == score.recall == 0.0


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("No pleural effusion, a small nodule is seen in the left lung.", {"nodule", "small", "left"}),
        ("The nodule is not seen.", set()),
        ("There is no consolidation but a large pneumothorax on the right.", {"pneumothorax", "large", "right"}),
        ("CT without contrast shows no mass.", {"ct", "non-contrast"}),
        ("MASS effect. Contrast-enhanced computed tomography", {"ct", "contrast"}),
        ("A mass is seen and a cyst is absent.", {"mass"}),
        ("Neither edema nor infarct is seen on this T1-weighted MR image.", {"mri", "T1"}),
        ("The right lung is clear. Left nodule.", {"left", "nodule"}),
        ("The heart is normal.", set()),
        ("There is no other abnormality.", set()),
        ("There isn't a cyst.", set()),
        ("This is not a CT scan.", set()),
        ("Otherwise normal x-ray with a nodule.", {"chest_xray", "nodule"}),
        ("No abnormality on this portable radiograph.", {"normal", "portable", "chest_xray"}),
        ("impression normal", {"normal"}),
        ("nodule nodule small upper upper left x-ray", {"nodule", "small", "upper", "left", "chest_xray"}),
        ("Formalin\u2011fixed gross specimen with a tiny hemorrhagic focus", {"gross", "fixed", "small", "hemorrhage"}),
    ],
)
def test_denial_synonyms_and_broken_text(text, facts):
    assert {value for _, value in stated_facts(text)} == facts


def test_means_and_recall_by_attribute():
    texts = [PERFECT, PERFECT.replace("left", "right"), "", PERFECT]
    scores = score_descriptions(texts, [NODULE] * 4)
    assert len(scores.items) == 4 and scores.f1 == pytest.approx((1 + 5 / 6 + 0 + 1) / 4)
    assert scores.by_attribute["side"] == 0.5 and scores.by_attribute["finding"] == 0.75


def test_a_mismatch_of_numbers_is_an_error():
    with pytest.raises(ValueError, match="2 texts but 1 scenes"):
        score_descriptions(["a", "b"], [NODULE])
    with pytest.raises(ValueError, match="no texts"):
        score_descriptions([], [])


@pytest.mark.slow
def test_every_fact_of_every_domain_can_be_stated():
    seen = set()
    for scene in SCENES:
        seen |= stated_facts(description(scene, rng(scene.seed)))
    wanted = {("domain", domain) for domain in DOMAINS} | {("finding", f) for d in DOMAINS for f in FINDINGS[d]}
    assert wanted | {("finding", NORMAL)} <= seen
