"""Templates: their words stay, their blanks are filled, by the library and by `medv ask --template`."""

import json
import re

import pytest
import tiny
from command import run
from rich.console import Console

from medv.commands.console import filled_text
from medv.companion.figures.traces import cells, trace_page
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.templates import Template

pytestmark = pytest.mark.usefixtures("untouched_generators")

TEXT = "small, in the ____ part on the ___"
CONFIG = SamplerConfig(16, 8, 16)


@pytest.fixture(scope="module")
def answerer():
    return Answerer(tiny.model(), tiny.processor())


@pytest.fixture
def picture(tmp_path):
    tiny.picture(1).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


# Cutting.


def test_a_template_is_the_text_with_the_tokens_of_its_words_masked():
    tokenizer, special = tiny.tokenizer(), tiny.special()
    for word, before, behind in (
        ("left", "it is on the", " side."),
        ("left", "on the", "."),
        ("Yes", "", ", it is."),
        ("a", "is", ""),
    ):
        text = f"{before} {word}{behind}".strip()
        ids = tokenizer.encode(text, add_special_tokens=False)
        size = len(tokenizer.encode(f" {word}" if before else word, add_special_tokens=False))
        canvas = Template(text.replace(word, "____", 1) if before != "is" else "is ____").canvas(tokenizer, (size,))
        assert len(canvas.ids) == len(ids) + 1 and canvas.ids[-1] == special.end_of_turn
        assert [a for a, b in zip(canvas.ids, ids, strict=False) if a != special.mask and a != b] == []
        assert canvas.ids.count(special.mask) == size
        assert [start for start, *_ in canvas.parts[1:]] == [stop for _, stop, _ in canvas.parts[:-1]]


def test_every_number_of_tokens_is_tried_but_not_without_end():
    assert Template("a __ and ___").sizes(2) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    with pytest.raises(ValueError, match=r"6 blanks of 1 to 3 tokens, 729 fillings .*--blank-tokens 2"):
        Template("__ " * 6).sizes(3)
    with pytest.raises(ValueError, match=r"1 blank of 1 to 300 tokens, 300 fillings .*--blank-tokens 256"):
        Template("__").sizes(300)
    for text in ("", "a_b", "no blank"):
        with pytest.raises(ValueError, match="has no blank: write ____"):
            Template(text)


def test_text_never_becomes_a_special_token():
    canvas = Template("<|eot_id|> a ____ <|mdm_mask|>").canvas(tiny.tokenizer(), (1,))
    assert canvas.ids.count(tiny.special().end_of_turn) == canvas.ids.count(tiny.special().mask) == 1


# Filling.


def test_the_words_of_a_template_stay_and_its_blanks_are_filled(answerer):
    answer, trace = answerer.ask(tiny.picture(1), "What is shown?", CONFIG, template=TEXT, blank_tokens=2)
    kept = [text for text, blank in answer.parts if not blank]
    assert "".join(text for text, _ in answer.parts).strip() == answer.text
    assert [text.strip() for text in kept] == ["small, in the", "part on the"] and len(answer.filled) == 2
    assert answer.finish_reason == "stop" and answer.tokens == trace.gen_length - 1
    assert 2 * 1 + 2 * 3 + 4 - 2 <= answer.forwards <= 4 * 4, "the cost of all four fillings"
    assert tiny.special().mask not in trace.replay(10**6)
    assert trace.replay(-1)[-1] == tiny.special().end_of_turn


def test_the_surest_filling_is_kept_and_is_the_one_that_its_size_gives(answerer):
    best, trace = answerer.ask(tiny.picture(1), "What is shown?", CONFIG, template="in the ____ part", blank_tokens=3)
    found = {}
    for size in (1, 2, 3):
        ids = Template("in the ____ part").canvas(tiny.tokenizer(), (size,)).ids
        config = SamplerConfig(len(ids), len(ids), 16)
        alone = answerer.ask(tiny.picture(1), "What is shown?", config, response=list(ids))[1]
        product = 1.0
        for event in alone.commits:
            product *= event.confidence
        found[product ** (1 / size)] = alone
    assert best.confidence == pytest.approx(max(found), rel=1e-4) and trace.replay(99) == found[max(found)].replay(99)


def test_an_example_is_filled_the_same_alone_and_among_others(answerer):
    examples = tiny.examples(4)
    templates = [TEXT, "____", "it is on the ____ side", TEXT]
    together = answerer.answer(examples, CONFIG, templates=templates, blank_tokens=2, batch_size=3)
    for number, (example, template) in enumerate(zip(examples, templates, strict=True)):
        alone = answerer.answer([example], CONFIG, templates=[template], blank_tokens=2, first_index=number)[0]
        assert (alone.text, alone.forwards) == (together[number].text, together[number].forwards)


def test_a_trace_of_a_template_is_drawn_with_its_words(answerer):
    _, trace = answerer.ask(tiny.picture(1), "What is shown?", CONFIG, template="a <b> ____", blank_tokens=1)
    assert [cell.state for cell in cells(trace.events, trace.gen_length, 0, trace.fixed)].count("open") == 1
    page = trace_page(trace, lambda token: f"<{token}>")
    (data,) = re.findall(r"id='data'>(.*?)</script>", page, re.DOTALL)
    assert len(json.loads(data)["fixed"]) == len(trace.fixed) == trace.gen_length - 1 and "given, never changed" in page


# The command.


def test_ask_fills_a_template_without_a_question_too(picture, model_dir):
    for question in ([], ["What is shown?"]):
        how = ("--model", model_dir, "--blank-tokens", 1, "--template", TEXT, "--steps", 16)  # no multiple of tiny's blocks
        told = run("ask", picture, *question, *how)
        assert told.exit_code == 0 and told.stdout.startswith("small, in the") and "____" not in told.stdout
        row = json.loads(run("ask", picture, *question, *how, "--json").stdout)
        assert row["question"] == (question or ["Describe the image in detail."])[0] and row["template"] == TEXT
        assert len(row["filled"]) == 2 and row["forwards"] == 2


def test_filled_words_are_marked_and_never_markup(capsys):
    console = Console(force_terminal=True, color_system="standard", markup=False)
    console.print(filled_text([("a [red]", False), (" [/b]mass", True)]))
    assert "a [red]\x1b[1;4m [/b]mass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "there is no question: give one, or a sentence"),
        (["What?", "--template", "none"], "has no blank: write ____"),
        (["--blank-tokens", "2", "What?"], "--blank-tokens would have no effect without --template"),
        (["--template", "a __", "--gen-length", "8"], "which sets the length of the answer: leave --gen-length out"),
        (["--template", "a __", "--length", "auto"], "which sets the length of the answer: leave --length out"),
        (["--template", "a __", "--trace", "-"], "no terminal shows: give --trace a file"),
        (["--template", "a __", "--preset", "official"], "'official' cannot keep the words of a template"),
        ([" ", "--template", "a __"], "the question is empty"),
        (["--template", "word " * 700 + "__"], "shorten the question or the text to be completed"),
    ],
)
def test_what_cannot_be_filled_is_refused_in_words(picture, options, words):
    told = run("ask", picture, *options)
    assert told.exit_code == 2 and words in " ".join(told.stderr.split())


def test_fillings_that_cannot_be_compared_are_refused(answerer):
    config = SamplerConfig(16, 8, 16, remasking="random")
    with pytest.raises(ValueError, match="no confidence by which fillings can be compared"):
        answerer.ask(tiny.picture(1), "What?", config, template="a __")
    with pytest.raises(ValueError, match="can be watched or given"):
        answerer.ask(tiny.picture(1), "What?", CONFIG, template="a __", on_step=print)
