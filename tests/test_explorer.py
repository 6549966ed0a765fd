"""The explorer without a browser: what it computes, keeps, marks and draws, and how it answers what cannot be asked."""

import html
import itertools
import threading
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny import model, processor

from medv.companion.explorer import lesson_widgets
from medv.companion.explorer import looked as explorer_looked
from medv.companion.explorer import view as explorer_view
from medv.companion.explorer.session import Cancelled, Outcome, Session, Setting, compare, gallery, read_upload
from medv.companion.explorer.view import explorer_figure
from medv.companion.explorer.widgets import Explorer
from medv.companion.figures.traces import word_of
from medv.data.example import load_image
from medv.data.images import ImageError
from medv.diffusion.trace import COMMIT, REMASK, Event, Trace
from medv.evaluation.answering import Answer, Answerer
from medv.model.views import ViewPlan
from medv.phantoms.sets import description_set

SETTING = Setting(16, 8, 16)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def network():
    return model(), processor()


@pytest.fixture
def explorer(network):
    """An explorer over two phantoms, with nothing asked yet."""
    made = Explorer(Answerer(*network), description_set("test", 2, image_size=32), setting=SETTING)
    made.question.value = "What is shown?"
    yield made
    made.cancel()
    made.wait()


def picture() -> Image.Image:
    return load_image(description_set("test", 1, image_size=32)[0])


def outcome(text: str, steps: int = 4, forwards: int = 4, trace: Trace | None = None) -> Outcome:
    answer = Answer("x", HOSTILE, text, 3, forwards, 0.5, "length")
    trace = trace or Trace((Event(0, 0, 0, 5, 0.5),), 2, 1)
    return Outcome("p", Setting(4, 4, steps), answer, trace)


class Tags(HTMLParser):
    """The elements and attributes of a page, as a browser finds them."""

    def __init__(self, page: str):
        super().__init__()
        self.names, self.attributes = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_a_sweep_asks_every_z_once_and_a_dragged_z_shows_the_kept_answer(explorer, monkeypatch):
    explorer.sweep()
    explorer.wait()
    assert explorer.drag.options == (2, 4, 8, 16) and not explorer.drag.disabled
    assert len(explorer.session.outcomes) == 4
    monkeypatch.setattr(explorer.session.answerer.model, "stream", None)  # a dragged Z asks the model nothing
    seen = set()
    for steps in (2, 16, 4, 8):
        explorer.drag.value = steps
        kept = explorer.session.found(explorer.picture, "What is shown?", replace(SETTING, steps=steps))
        assert explorer.outcome is kept and kept.answer.forwards <= steps == explorer.fields["steps"].value
        assert f"Z = {steps} " in explorer.text.value and f"of {kept.frames}:" in explorer.canvas.value
        seen.add(explorer.chart.value)
    assert len(seen) == 4, "the ring on the chart follows"
    explorer.sweep()
    explorer.wait()
    assert len(explorer.session.outcomes) == 4


def test_the_canvas_of_every_frame_is_the_replay_of_the_trace(network):
    session = Session(Answerer(*network))
    drawn = [replace(SETTING, revision="remdm", temperature=1.0, seed=seed) for seed in range(20)]
    runs = (session.ask(picture(), "What is shown?", each) for each in drawn)
    asked = next(run for run in runs if any(event.kind == REMASK for event in run.trace.events))
    trace, mask = asked.trace, asked.trace.mask_token_id
    for frame in range(asked.frames + 1):
        canvas = asked.canvas(frame)
        written = [cell.token if cell.state in ("fresh", "written") else mask for cell in canvas]
        assert written == trace.replay(frame - 1)
        now = [event for event in trace.events if event.step == frame - 1]
        lost = {event.position for event in now if event.kind == REMASK}
        assert {place for place, cell in enumerate(canvas) if cell.state == "lost"} == lost
        fresh = {event.position for event in now if event.kind == COMMIT} - lost
        assert {place for place, cell in enumerate(canvas) if cell.state == "fresh"} == fresh
        page = explorer_view.canvas_html(asked, frame, word_of(network[1].tokenizer))
        assert page.count("medv-cell lost") == len(lost) and page.count("medv-cell fresh") == len(fresh)


def test_what_is_marked_is_what_is_counted():
    said = outcome("the small mass the small mass is is round")
    assert [part for part, again in said.parts if again] == ["the small mass", "is"]
    marked = explorer_view.answer_html(said)
    inside = [piece.split("</mark>")[0] for piece in marked.split('<mark title="said before">')[1:]]
    assert sum(len(piece.split()) for piece in inside) * 100 / 9 == pytest.approx(said.repetition)
    assert "<mark" not in explorer_view.answer_html(outcome("every word differs"))


def test_words_of_models_questions_and_files_are_never_markup(network):
    told = outcome(f"{HOSTILE} {HOSTILE}")
    told = replace(told, picture=HOSTILE)
    pages = [
        explorer_view.answer_html(told, HOSTILE),
        explorer_view.message(HOSTILE, "error"),
        explorer_view.chart_html([told], told),
        explorer_view.canvas_html(told, 1, lambda _: HOSTILE),
    ]
    for page in pages:
        tags = Tags(page)
        assert "&lt;script&gt;" in page and not tags.names & {"script", "img"} and "onerror" not in tags.attributes


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 15, "steps 15 is not a multiple of the 2 blocks: use 14"),
        ("block_length", 5, "block_length 5 does not divide gen_length 16"),
        ("gen_length", 0, "gen_length is 0"),
        ("question", "  ", "the question is empty"),
        ("question", "why " * 1250, "shorten the question"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(explorer, field, value, words):
    fields = explorer.fields | {"question": explorer.question}
    fields[field].value = value
    explorer.answer()
    explorer.wait()
    assert words in explorer.message.value and "medv-error" in explorer.message.value
    assert explorer.outcome is None and not explorer.answer_button.disabled
    explorer.question.value, fields["gen_length"].value = "What is shown?", 16
    fields["block_length"].value = fields["steps"].value = 8
    explorer.answer()
    explorer.wait()
    assert "1 run in" in explorer.message.value


def test_a_broken_upload_says_so_with_its_own_name_and_keeps_the_picture(explorer):
    before = explorer.picture
    explorer._uploaded([{"name": "x<b>.png", "content": memoryview(b"junk")}])
    assert "x&lt;b&gt;.png" in explorer.message.value and "not a readable" in explorer.message.value
    assert explorer.picture is before
    with pytest.raises(ImageError, match=r"^'a/../b.png' is empty"):
        read_upload("a/../b.png", b"")
    good = explorer_view.png(picture(), 40)
    explorer._uploaded([{"name": "mine.png", "content": memoryview(good)}])
    assert explorer.name == "mine.png" and explorer.picture.size == (40, 40)


def test_a_run_can_be_cancelled_and_what_was_finished_stays(explorer, monkeypatch):
    explorer.answer()
    explorer.wait()
    reached, go = threading.Event(), threading.Event()
    stream = explorer.session.answerer.model.stream

    def slow(*args, **options):
        steps = stream(*args, **options)
        yield next(steps)
        reached.set()
        assert go.wait(30)
        return (yield from steps)

    monkeypatch.setattr(explorer.session.answerer.model, "stream", slow)
    explorer.sweep()
    assert reached.wait(30)
    assert explorer.answer_button.disabled and not explorer.cancel_button.disabled
    explorer.answer()
    assert "under way" in explorer.message.value
    explorer.cancel()
    go.set()
    explorer.wait()
    assert "cancelled: 1 finished run is kept" in explorer.message.value
    assert len(explorer.session.outcomes) == 1 and not explorer.answer_button.disabled


def test_a_run_that_dies_says_why(explorer, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(explorer.session.answerer.model, "stream", broken)
    explorer.answer()
    explorer.wait()
    assert "RuntimeError: out of &lt;memory&gt;" in explorer.message.value and not explorer.answer_button.disabled


def test_a_pinned_answer_stays_beside_the_next(explorer):
    explorer.answer()
    explorer.wait()
    first = explorer.outcome
    explorer.pin()
    explorer.fields["steps"].value = 2
    explorer.answer()
    explorer.wait()
    assert explorer.pinned is first and "Z = 2 " in explorer.text.value and "Z = 16 " in explorer.pinned_text.value
    assert explorer.frame.max == first.frames and explorer.right.layout.display == "flex"
    explorer.frame.value = 1
    assert "forward 1 of" in explorer.canvas.value and f"forward 1 of {first.frames}" in explorer.pinned_canvas.value
    explorer.pin()
    assert explorer.pinned is None and explorer.right.layout.display == "none"


def test_the_maps_are_of_the_words_of_the_answer_that_is_shown(explorer):
    looked = explorer.looked
    assert looked.button.disabled
    explorer.answer()
    explorer.wait()
    looked.look()
    looked.wait()
    first = looked.page.value
    words = [piece.split("</b>")[0] for piece in first.split('class="medv-look"')[1:] for piece in [piece.split("<b>")[1]]]
    assert html.unescape("".join(words)) == explorer.outcome.answer.text.replace(" ", "")
    assert first.count("data:image/png") == 1 + len(words) and "nats" in first
    explorer.fields["steps"].value = 2
    explorer.answer()
    explorer.wait()
    assert looked.page.value == "", "another answer has no maps yet"
    explorer.fields["steps"].value = 16
    assert looked.page.value == first, "and those of the first are kept"


def test_maps_can_be_stopped_and_a_failure_is_told(explorer, monkeypatch):
    explorer.answer()
    explorer.wait()
    looked, reached, go = explorer.looked, threading.Event(), threading.Event()
    real = explorer_looked.attribute

    def slow(*args, on_step, **options):
        def told(*counts):
            reached.set()
            assert go.wait(30)
            on_step(*counts)

        return real(*args, on_step=told, **options)

    monkeypatch.setattr(explorer_looked, "attribute", slow)
    looked.look()
    assert reached.wait(30)
    looked.look()
    go.set()
    looked.wait()
    assert looked.page.value == "" and not looked.kept
    monkeypatch.setattr(explorer_looked, "attribute", lambda *_, **__: 1 / 0)
    looked.look()
    looked.wait()
    assert "ZeroDivisionError" in looked.page.value and "medv-error" in looked.page.value


def test_words_that_are_checked_stay_and_the_rest_is_filled_again(explorer):
    keeping = explorer.keeping
    assert keeping.choose_button.disabled and keeping.fill_button.disabled
    explorer.answer()
    explorer.wait()
    first = explorer.outcome
    keeping.choose_button.click()
    boxes = list(keeping.boxes)
    assert "".join(box.description for box in boxes) == first.answer.text.replace(" ", "") and not any(b.value for b in boxes)
    keeping.word = lambda token: f" {token}"  # the text of a random model has too few spaces
    keeping.choose_button.click()
    assert [place for places in keeping.boxes.values() for place in places] == list(range(first.answer.tokens))
    keeping.fill_button.click()
    keeping.wait()
    assert explorer.outcome.trace == first.trace, "with nothing kept it is the same answer"
    keeping.choose_button.click()
    boxes = list(keeping.boxes)
    boxes[-1].value = True
    last = keeping.boxes[boxes[-1]]
    keeping.fill_button.click()
    keeping.wait()
    second = explorer.outcome
    assert {event.position for event in second.trace.fixed} == set(last) and second.answer.finish_reason in ("stop", "length")
    written = [outcome.trace.replay(10**9) for outcome in (first, second)]
    assert [written[0][place] for place in last] == [written[1][place] for place in last]
    assert not {event.position for event in second.trace.events} & set(last)
    assert [places for box, places in keeping.boxes.items() if box.value] == [last], "it stays checked"
    assert explorer.canvas.value.count("medv-cell fixed") == len(last) and f"{len(last)} kept" in explorer.canvas.value
    assert len(explorer.session.outcomes) == 1, "the chart is of whole answers"
    explorer.looked.look()
    explorer.looked.wait()
    assert "medv-error" not in explorer.looked.page.value, "the words that were filled have maps"


def test_a_chosen_length_stays_when_the_rest_is_filled(explorer):
    explorer.fields["length"].value = "auto"
    explorer.answer()
    explorer.wait()
    first, keeping = explorer.outcome, explorer.keeping
    assert first.trace.fixed and not first.kept and not keeping.boxes, "its end is fixed, and no word"
    keeping.word = lambda token: f" {token}"
    keeping.choose_button.click()
    next(iter(keeping.boxes)).value = True
    keeping.fill_button.click()
    keeping.wait()
    assert explorer.outcome.kept == {0} and explorer.outcome.answer.tokens == first.answer.tokens


def test_words_of_an_answer_are_labels_and_never_markup(explorer, monkeypatch):
    explorer.answer()
    explorer.wait()
    explorer.keeping.word = lambda _: f" {HOSTILE}"
    explorer.keeping.choose_button.click()
    assert all(box.description == HOSTILE and not box.description_allow_html for box in explorer.keeping.boxes)
    monkeypatch.setattr(explorer.session, "fill", lambda *_: 1 / 0)
    explorer.keeping.fill_button.click()
    explorer.keeping.wait()
    assert "ZeroDivisionError" in explorer.keeping.message.value and not explorer.keeping.fill_button.disabled


def test_another_picture_or_setting_has_runs_of_its_own(explorer):
    explorer.sweep()
    explorer.wait()
    explorer.choose(1)
    assert explorer.drag.disabled
    explorer.answer()
    explorer.wait()
    assert len(explorer.session.outcomes) == 5 and explorer.outcome.picture == "phantom 2"
    explorer.choose(0)
    assert explorer.drag.options == (2, 4, 8, 16) and explorer.outcome.picture == "phantom 1"
    assert explorer.chart.value.count("<polyline") == 2 * 4


def test_the_same_setting_gives_the_same_answer_in_a_new_session(network):
    drawn = replace(SETTING, temperature=1.0, seed=3)
    texts = [Session(Answerer(*network)).ask(picture(), "What is shown?", drawn).answer.text for _ in range(2)]
    other = Session(Answerer(*network)).ask(picture(), "What is shown?", replace(drawn, seed=4)).answer.text
    assert texts[0] == texts[1] != other


def test_a_cancelled_run_leaves_nothing_behind(network):
    session = Session(Answerer(*network))

    def stop(_):
        raise Cancelled

    with pytest.raises(Cancelled):
        session.ask(picture(), "What is shown?", SETTING, on_step=stop)
    assert session.outcomes == {}


def test_a_sweep_is_told_from_its_numbers():
    falls = compare([outcome("a a a a", 1, 1), outcome("a b c d", 4)])
    assert "75 % at Z = 1" in falls and "0 % at Z = 4" in falls and "is seen" in falls
    assert "does not appear" in compare([outcome("a b c", 1), outcome("a a a", 4)])
    with pytest.raises(ValueError, match="sweep Z first"):
        compare([outcome("a")])


def test_the_figure_and_its_rows_are_the_runs(network):
    session = Session(Answerer(*network))
    runs = list(session.sweep(picture(), "a $ in a question", SETTING))
    fig, frame = explorer_figure(picture(), runs, word_of(network[1].tokenizer))
    fig.canvas.draw()
    assert frame["steps"].tolist() == [2, 4, 8, 16] and (frame["forwards"] <= frame["steps"]).all()
    with pytest.raises(ValueError, match="no run to draw"):
        explorer_figure(picture(), [], str)


def test_the_gallery_shows_every_domain():
    scenes = [example.meta["scene"] for example in gallery()]
    assert len({scene.domain for scene in scenes}) == 5 and len(scenes) == 6


def test_the_forward_process_masks_more_with_time_and_never_the_question(network):
    still = lesson_widgets.forward_process(network[1], "What is shown?", "a small mass")
    _, row, shown = still.children
    time_slider, again = row.children
    hidden = []
    for t in (0.0, 0.4, 0.8, 1.0):
        time_slider.value = t
        hidden.append(np.array(["masked" in cell.split(">")[0] for cell in shown.value.split("medv-cell")[1:]]))
    assert all((a <= b).all() for a, b in itertools.pairwise(hidden)) and hidden[-1].any()
    question = len(network[1].tokenizer.encode("What is shown?", add_special_tokens=False))
    assert not hidden[-1][:question].any() and hidden[-1][question:].all()
    time_slider.value = 0.4
    first = shown.value
    for _ in range(5):
        again.click()
    assert shown.value != first
    assert shown.value in still._repr_mimebundle_()["text/html"]


def test_the_loss_weights_widget_shows_the_weights_of_the_loss():
    lengths = (3, 9)
    still = lesson_widgets.loss_weights(lengths)
    _, row, shown = still.children
    time_slider, again = row.children
    time_slider.value = 1.0  # everything is masked, p = 1: the weights are known without the library
    by_hand = {"sample": ("0.167", "0.0556"), "token": ("0.0833",) * 2, "masked": ("0.0833",) * 2}
    for name, weights in by_hand.items():
        line = shown.value.split(f">{name}</th>")[1].split("</tr>")[0]
        assert tuple(cell.split("</span> ")[1] for cell in line.split("</td>")[:-1]) == weights, name
    seen = set()
    time_slider.value = 0.1
    for _ in range(20):
        again.click()
        seen.add(shown.value)
    assert any("nothing masked" in page for page in seen) and len(seen) > 1
    assert shown.value in still._repr_mimebundle_()["text/html"]
    with pytest.raises(ValueError, match="at least one token"):
        lesson_widgets.loss_weights((3, 0))


def test_the_aspect_widget_counts_what_the_plan_counts():
    grid = ((64, 32), (32, 64), (64, 64))
    still = lesson_widgets.aspect_modes(picture(), ViewPlan(32, 2, "anyres", grid, None, "spatial_unpad"))
    _, mode, shape, shown = still.children
    counts = {}
    for name in ("square", "pad", "anyres"):
        mode.value = name
        counts[name] = int(shown.value.split(" visual tokens")[0].split()[-1].replace(",", ""))
    assert counts["square"] == counts["pad"] == 2 * 2 + 1 < counts["anyres"]
    before = shown.value
    shape.value = 0.5
    assert shown.value != before
