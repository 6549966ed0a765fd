"""The words of the phantoms: true, varied, of the promised length, and few enough for a small model."""

import re
from collections import Counter

import numpy as np
import pytest

from medv.phantoms.general import COUNTS, sample_shapes
from medv.phantoms.scene import DOMAINS, FINDINGS, NORMAL, sample_scene
from medv.phantoms.wording import MODALITY, caption, description, shapes_caption, shapes_description, shapes_tags, tags

SCENES = [sample_scene(seed) for seed in range(2000)]


def rng(seed):
    return np.random.default_rng([seed, 1])


@pytest.fixture(scope="module")
def descriptions():
    return [description(scene, rng(scene.seed)) for scene in SCENES]


def test_captions_are_one_sentence_of_8_to_20_words():
    for scene in SCENES:
        text = caption(scene, rng(scene.seed))
        assert 8 <= len(text.split()) <= 20, text
        assert text.count(".") == 1 and text.endswith("."), text


def test_descriptions_have_40_to_120_words(descriptions):
    lengths = [len(text.split()) for text in descriptions]
    assert min(lengths) >= 40 and max(lengths) <= 120


def test_descriptions_hardly_repeat(descriptions):
    assert len(set(descriptions)) > 0.95 * len(descriptions)


def test_one_scene_is_described_in_many_ways_and_orders():
    scene = sample_scene(3, domain="ct", finding="cyst", side="left")
    texts = [description(scene, rng(seed)) for seed in range(300)]
    assert len(set(texts)) > 0.95 * len(texts)
    assert len({text.split(". ")[0] for text in texts}) > 20
    assert len({caption(scene, rng(seed)) for seed in range(300)}) >= 12


def test_no_phrase_of_a_domain_dominates(descriptions):
    """At least four openings share the impressions of each domain."""
    for domain in DOMAINS:
        last = Counter(
            text.rsplit(". ", 1)[1].split()[0] for s, text in zip(SCENES, descriptions, strict=True) if s.domain == domain
        )
        assert len(last) >= 4 and max(last.values()) < 0.6 * sum(last.values()), (domain, last)


def test_what_is_there_is_never_denied(descriptions):
    denial = re.compile(r"\b(no|neither|absent|without)\b", re.IGNORECASE)
    for scene, text in zip(SCENES, descriptions, strict=True):
        denied = [sentence.lower() for sentence in text.split(". ") if denial.search(sentence)]
        assert denied and not any(scene.finding in sentence for sentence in denied if scene.finding != NORMAL), text


def test_articles_are_right(descriptions):
    for text in [*descriptions, *(caption(scene, rng(scene.seed)) for scene in SCENES)]:
        assert not re.search(r"\b[Aa] ([aeiou]|MR)", text), text
        assert not re.search(r"\b[Aa]n [^aeiouM]", text), text
        assert not re.search(r"[{}]|  |\bNone\b", text), text


def test_every_finding_of_every_domain_has_its_words():
    for domain in DOMAINS:
        for finding in (*FINDINGS[domain], NORMAL):
            scene = sample_scene(11, domain=domain, finding=finding)
            for seed in range(20):
                for text in (caption(scene, rng(seed)), description(scene, rng(seed))):
                    assert finding in text.lower() or finding == NORMAL
                    assert MODALITY[domain].split()[-1] in text or "radiograph" in text or "image" in text or "x-ray" in text


def test_tags_are_the_facts_in_any_order():
    orders = set()
    for scene in SCENES[:300]:
        words = tags(scene, rng(scene.seed))
        facts = {value for name, value in scene.facts() if name != "domain"} | {MODALITY[scene.domain]}
        assert set(words) == facts and len(words) == len(facts)
        orders.add(words.index(MODALITY[scene.domain]))
    assert len(orders) == 6


def test_shapes_are_put_into_words():
    for seed in range(300):
        scene = sample_shapes(seed)
        for text in (shapes_caption(scene, rng(seed)), shapes_description(scene, rng(seed))):
            for fact in (scene.shape, scene.color, scene.background, COUNTS[scene.count]):
                assert fact in text.lower(), (fact, text)
        assert len(shapes_tags(scene, rng(seed))) == 4


def test_the_same_generator_gives_the_same_words():
    for scene in SCENES[:50]:
        assert description(scene, rng(5)) == description(scene, rng(5))
        assert caption(scene, rng(5)) == caption(scene, rng(5))
        assert tags(scene, rng(5)) == tags(scene, rng(5))
