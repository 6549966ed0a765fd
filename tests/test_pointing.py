"""The pointing game of notebook 42: what it must score for maps whose worth is known, and which words it asks about."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from medv.checkpoints.assembly import new_processor, random_model, shape_config
from medv.companion.explorer.looked import looked_html
from medv.companion.figures.overlays import LEAST, WordMap, colored, overlay_figure, pointing_figure, region_name, word_maps
from medv.companion.figures.traces import word_of
from medv.companion.studies import attribution as study
from medv.diffusion.trace import Event
from medv.evaluation.answering import Answerer
from medv.evaluation.attribution import Attribution, Regions
from medv.intervals import NOT_MEASURED
from medv.phantoms.facts import fact_spans, named_spans
from medv.profiles import get_profile

SMOKE = get_profile("smoke")
REGIONS = Regions(4, 4)


@pytest.fixture(scope="module")
def examples():
    """A hundred lesions and their masks."""
    drawn = study.lesions(replace(SMOKE, evaluation_descriptions=34))[:100]
    return [(example, study.lesion_mask(example.meta["scene"])) for example in drawn]


def named(examples, point) -> list[study.Named]:
    """A word of each kind about every lesion, with a map that `point(mask, rng)` makes; every fifth word is wrong."""
    rng, found = np.random.default_rng(0), []
    for number, (example, mask) in enumerate(examples):
        hits = study.regions_hit(REGIONS, mask)
        for kind in study.KINDS:
            drops = {way: point(mask, rng).astype(np.float32) for way in ("pixels", "tokens")}
            found.append(study.Named(example.id, kind, kind, number % 5 > 0, None, mask, hits, drops))
    return found


def test_maps_made_of_the_mask_score_all_and_random_maps_score_chance(examples):
    def of_mask(mask, _):
        return mask.reshape(4, 16, 4, 16).mean(axis=(1, 3))

    perfect = study.pointing_items(named(examples, of_mask))
    assert perfect["lesion"].nunique() == 100 and (perfect["hit"] == 100).all()
    said = study.pointing_verdict(perfect, perfect)
    assert "for 100.0 [100.0, 100.0] % of the words, n = 100 lesions" in said and "above chance" in said
    assert "not shown to differ from hiding visual tokens: +0.0 [+0.0, +0.0] points, n = 100" in said
    blind = study.pointing_items(named(examples, lambda _, rng: rng.random((4, 4))))
    for base in ("chance", "shuffled images"):
        gap = study.by_lesion(blind, "hit", base)
        assert gap.low < 0 < gap.high, base
    assert "It is not shown to be above chance" in study.pointing_verdict(blind, blind)
    assert blind["chance"].mean() == pytest.approx(perfect["chance"].mean()) and 15 < blind["chance"].mean() < 40


def test_a_map_that_always_points_at_one_place_gains_nothing_over_shuffled_images(examples):
    middle = np.zeros((4, 4))
    middle[1, 1] = 1
    items = study.pointing_items(named(examples, lambda *_: middle))
    assert (items["hit"] == items["shuffled images"]).all()
    corners = [
        study.pointing_items(named(examples, lambda *_, at=at: np.eye(16)[at].reshape(4, 4)))["hit"] for at in (5, 6, 9, 10)
    ]
    assert np.mean(corners, axis=0) == pytest.approx(items["center"]), "the center is the mean of the regions around it"
    assert study.central(3, 3) == [4] and study.central(4, 4) == [5, 6, 9, 10] and study.central(2, 3) == [1, 4]


def test_rates_and_table_split_words_by_kind_and_truth(examples, monkeypatch):
    monkeypatch.setattr(study, "bootstrap", partial(study.bootstrap, resamples=20))
    items = study.pointing_items(named(examples, lambda _, rng: rng.random((4, 4))))
    rates = study.pointing_rates(items, items)
    assert list(dict.fromkeys(rates["words"])) == ["all words", *study.KINDS, "correct finding", "wrong finding", study.SHOWN]
    count = rates.set_index(["words", "system"])["n"]
    assert (
        count["correct finding", study.OURS] == 80
        and count["wrong finding", study.OURS] == 20
        and count["side", "chance"] == 100
    )
    rows = items[items["kind"] == "side"]["hit"]
    assert rates.set_index(["words", "system"])["value"]["side", study.OURS] == pytest.approx(rows.mean())
    right, wrong = (study.groups_of(items)[f"{name} finding"] for name in ("correct", "wrong"))
    gap = study.apart(right.assign(hit=100.0), wrong.assign(hit=0.0))
    assert (gap.value, gap.low, gap.high, gap.n) == (100, 100, 100, 100)
    same = study.apart(right, wrong)
    assert same.low < 0 < same.high and same.value == pytest.approx(right["hit"].mean() - wrong["hit"].mean())
    assert study.pointing_table(items)["n"].tolist() == [100, 100, 100, 100, 80, 20, 100]


def test_the_words_whose_map_is_shown_are_those_with_a_drop_that_the_explorer_names(examples):
    items = study.pointing_items(named(examples, lambda _, rng: rng.choice([0.01, 0.2]) * rng.random((4, 4))))
    shown = study.groups_of(items)[study.SHOWN]
    assert 0 < len(shown) < len(items) and shown["drop"].min() >= 0.05 > items["drop"].drop(shown.index).max()
    assert f"{100 * len(shown) / len(items):.0f} % of the words have a region" in study.pointing_verdict(items, items)


def test_without_lesions_nothing_is_measured_and_all_is_drawn():
    items = study.pointing_items([])
    assert study.pointing_verdict(items, items) == (
        f"The pointing game is {NOT_MEASURED}: it needs drawn lesions, whose place is known."
    )
    rates = study.pointing_rates(items, items)
    assert rates["value"].isna().all() and (rates["n"] == 0).all()
    for fig in (pointing_figure(rates, "no lesions"), overlay_figure([], "nothing")):
        fig.canvas.draw()


def test_the_words_asked_about_are_those_of_the_answer_and_their_tokens():
    text = "There is a large mass on the left, and no cyst in the upper part."
    assert [(text[start:end], fact[0]) for start, end, fact in named_spans(text)] == [
        ("large", "size"),
        ("mass", "finding"),
        ("left", "side"),
    ]
    assert study.tokens_in(["There", " is", " a", " pleu", "ral", " effusion"], 11, 27) == [3, 4, 5]
    scene = study.lesions(SMOKE)[0].meta["scene"]
    assert [span[:2] for span in fact_spans(text, scene)] == [span[:2] for span in named_spans(text)]


def test_a_model_is_asked_three_questions_about_each_lesion_and_its_words_are_mapped(monkeypatch):
    shape, special = tiny.shape(patch_size=8), tiny.special()
    own = Answerer(random_model(shape, special, seed=0).eval(), new_processor(tiny.tokenizer(), shape_config(shape, special)))
    few = replace(SMOKE, evaluation_descriptions=1, model=replace(SMOKE.model, image_size=32))
    drawn = study.lesions(few)
    asked = study.questions(drawn)
    assert len(drawn) == 3 and [example.meta["kind"] for example in asked] == list(study.KINDS) * 3
    # A random model names no fact: any first word is taken to name what was asked for.
    monkeypatch.setattr(study, "named_spans", lambda text: [(0, 1, (kind, "")) for kind in study.KINDS] if text else [])
    words = study.named_words(own, few, drawn)
    assert {word.kind for word in words} == set(study.KINDS) and not any(word.right for word in words)
    assert [set(word.drops) for word in words if word.lesion == drawn[0].id] == [{"pixels", "tokens"}] * 3
    assert all(set(word.drops) == {"pixels"} for word in words if word.lesion != drawn[0].id)
    shown = study.word_overlays(words) + study.real_overlays(own, few, tiny.examples(2))
    overlay_figure([row[1:] for row in shown], "words").canvas.draw()
    assert len(study.overlay_frame(shown)) == 16 * len(shown)


def test_words_are_told_with_their_strongest_region_and_noise_stays_pale():
    drops = np.zeros((2, 3, 3), np.float32)
    drops[0, 0, 2], drops[1, 1, 1] = 1.5, -0.25
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode(" is on", add_special_tokens=False)
    events = tuple(Event(0, 0, place, token, 0.5) for place, token in enumerate(ids))
    found = Attribution(events, Regions(3, 3), torch.zeros(len(ids)), torch.zeros(len(ids), 3, 3))
    assert "".join(each.text for each in word_maps(found, word_of(tokenizer))) == "ison"
    given = (Event(-1, 0, len(ids), ids[0], 1.0, "fixed"), Event(-1, 0, len(ids) + 2, ids[-1], 1.0, "fixed"))
    with_given = word_maps(found, word_of(tokenizer), given)
    assert [each.drops is None for each in with_given[-2:]] == [True, True], "a given word has no map, and a gap ends a word"
    page = looked_html(Image.new("RGB", (8, 8)), with_given)
    assert page.count("medv-look-given") == 2 and page.count('class="medv-look"') == len(with_given) - 2
    first, second = WordMap("mass", (0,), drops[0]), WordMap("left", (1,), drops[1])
    assert first.told == "mass: most from the upper right, row 1 column 3 (+1.50 nats); all regions from +0.00"
    assert second.strongest is None and second.told == "left: no region matters by itself (-0.25 to +0.00 nats)"
    assert region_name(26, 13, 27, 27) == "the lower center, row 27 column 14"
    pale = colored(np.array([[0.0, LEAST / 10]]), LEAST)[..., 3]
    assert pale[0, 0] == 0 and 0 < pale[0, 1] < 0.1
