"""Notebook 41: what is hidden, who fills it, and what is said about it."""

import re

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from medv.companion.figures.studies import hidden_word_bars
from medv.companion.studies import infilling as study
from medv.evaluation.answering import Answerer
from medv.model.twin import causal_twin
from medv.phantoms.facts import stated_facts
from medv.phantoms.sets import description_set

pytestmark = pytest.mark.usefixtures("untouched_generators", "few_resamples")


@pytest.fixture(scope="module")
def drawn():
    return study.hidden_words(description_set("test", 40))


@pytest.fixture(scope="module")
def answerers():
    network = tiny.model()
    return Answerer(network, tiny.processor()), Answerer(causal_twin(network).eval(), tiny.processor())


def test_the_first_mention_of_a_true_fact_is_hidden_and_the_rest_is_given(drawn):
    assert {item.kind for item in drawn} == set(study.KINDS) and len({(i.example.id, i.kind) for i in drawn}) == len(drawn)
    for item in drawn:
        assert item.template == item.before + "____" + item.behind
        assert item.template.replace("____", item.word) == item.example.answer.strip()
        values = {value for kind, value in item.example.meta["scene"].facts() if kind == item.kind}
        assert stated_facts(item.word) <= {(item.kind, value) for value in values}, "it is true of the scene"
        assert not re.search(rf"\b{item.word}\b", item.before, re.IGNORECASE), "it is the first mention"
        assert not re.search(rf"\b{item.word}\b", item.everywhere, re.IGNORECASE)
        assert re.sub("____", item.word, item.everywhere).lower() == item.example.answer.strip().lower()
    assert sum(item.everywhere.count("____") > 1 for item in drawn) > 0.9 * len(drawn), "phantoms are described twice"


def test_texts_that_state_nothing_are_refused():
    plain = [example for example in tiny.examples(2) if example.answer in ("chest", "yes")]
    with pytest.raises(ValueError, match="none of 2 references states a finding"):
        study.hidden_words(plain)


def test_the_control_shows_another_image_of_the_domain_beside_the_same_text(drawn):
    for item, other in zip(drawn, study.another_image(drawn), strict=True):
        assert (other.template, other.word, other.example.id) == (item.template, item.word, item.example.id)
        assert other.example.image is not item.example.image
        assert any(e.example.image is other.example.image and e.example.domain == item.example.domain for e in drawn)


def test_the_most_frequent_word_is_counted_in_other_texts(drawn):
    for item, guess in zip(drawn, study.most_frequent(drawn), strict=True):
        others = [each.word.lower() for each in drawn if each.kind == item.kind and each.example.id != item.example.id]
        assert others.count(guess) == max(map(others.count, others))


def test_the_twin_continues_greedily_what_stands_before_the_blank(answerers):
    twin, items = answerers[1], study.hidden_words(tiny.examples(8))
    most = study.most_tokens(twin, items)
    words, tokenizer = study.continued_by_twin(twin, items, batch_size=3), tiny.tokenizer()
    for item, word in zip(items, words, strict=True):
        inputs = twin.inputs([item.example])
        before = tokenizer.encode(item.before.rstrip(" "), add_special_tokens=False) if item.before else []
        ids = torch.cat([inputs["input_ids"], torch.tensor([before]).long()], dim=1)
        start, config = ids.shape[1], twin.model.config
        for _ in range(most):
            with torch.no_grad():
                states = twin.model(ids, pixel_values=inputs["pixel_values"], logits_to_keep=slice(-1, None)).logits[0, -1]
            states[[*config.suppress_token_ids, config.image_token_id]] = -torch.inf
            ids = torch.cat([ids, states.argmax().view(1, 1)], dim=1)
            if int(ids[0, -1]) in config.stop_token_ids:
                break
        found = re.findall(r"[^\W_]+", tiny.processor().decode_response(ids[0, start:].tolist()))
        assert word == (found[0] if found else "")


def test_a_word_is_right_where_it_is_the_hidden_one(answerers):
    items = study.hidden_words(tiny.examples(8))[:4]
    frame = study.measured(items, *answerers, batch_size=3)
    for system in study.SYSTEMS[:-1]:
        right = [100.0 * (a.lower() == b.lower()) for a, b in zip(frame[f"{system}: word"], frame["word"], strict=True)]
        assert frame[system].tolist() == right
    assert frame[study.CHANCE].between(0, 100, inclusive="right").all()
    bars = study.accuracies(frame)
    assert set(bars["metric"]) == {*frame["kind"], "all"} and set(bars["system"]) == set(study.SYSTEMS)
    hidden_word_bars(bars, "title", pale=study.OTHER).canvas.draw()
    without = study.measured(items[:2], answerers[0], None)
    assert without[study.TWIN].isna().all() and "not measured" in study.verdict(without)
    assert len(study.words_table(without)) and len(study.examples_table(without)) == 2


def graded(ours: float, twin: float, other: float) -> pd.DataFrame:
    """400 words in 100 texts; each system is right this often."""
    rng = np.random.default_rng(0)
    rates = {study.OURS: ours, study.TWIN: twin, study.BLIND: twin, study.OURS + study.OTHER: other}
    rates |= {study.TWIN + study.OTHER: twin, study.BLIND + study.OTHER: twin, study.FREQUENT: 0.5}
    hits = {name: 100.0 * (rng.random(400) < rate) for name, rate in rates.items()}
    base = {"id": np.repeat(np.arange(100), 4), "kind": study.KINDS * 100, "word": "left", study.CHANCE: 50.0}
    return pd.DataFrame(base | hits)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((0.9, 0.5, 0.5), ("the diffusion model is right more often", "it uses the image")),
        ((0.5, 0.9, 0.9), ("the twin is right more often", "another image serves it better")),
        ((0.6, 0.6, 0.6), ("no difference is shown", "no use of the image is shown")),
    ],
)
def test_the_verdict_is_that_of_the_interval_whichever_way_it_ends(rates, words):
    lines = study.verdict(graded(*rates)).splitlines()
    assert words[0] in next(line for line in lines if line.startswith("all (400 words), given all"))
    assert words[1] in next(line for line in lines if line.startswith(study.OURS))
    assert "no difference is shown" in next(line for line in lines if line.startswith("all (400 words), with the word hidden"))
