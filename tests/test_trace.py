"""A trace as it happens, as a file and as a picture: streams, JSON, the page, the terminal, and `medv ask --trace`."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import tiny
import torch
from command import SHORT, run, save_picture
from rich.console import Console
from test_sampler import FILL, MASK, Table, confident
from typer.testing import CliRunner

from medv.cli import app
from medv.companion.figures.traces import POLICY, TerminalView, trace_page, trace_targets, word_of, write_trace
from medv.diffusion.caching import DualCache
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import MinSpacing
from medv.diffusion.official import sample as official_sample
from medv.diffusion.revision import ReMDM, RevealRemask
from medv.diffusion.sampler import sample, stream
from medv.diffusion.schedules import BudgetedSchedule, ThresholdSchedule
from medv.diffusion.trace import COMMIT, REMASK, Event, Trace, drain

BASE = SamplerConfig(gen_length=16, block_length=8, steps=16)
CONFIGS = (
    BASE,
    replace(BASE, steps=6, temperature=0.8, cfg_scale=1.0),
    replace(BASE, schedule=ThresholdSchedule(0.3), filters=(MinSpacing(2),)),
    replace(BASE, steps=8, schedule=BudgetedSchedule()),
    replace(BASE, revision=RevealRemask(0.25)),
    replace(BASE, revision=ReMDM("cap", eta=0.5)),
)
IDS = {"mask_token_id": MASK, "fill_token_id": FILL}


@pytest.fixture(scope="module")
def network():
    return tiny.model()


def prompts(rows=(0, 1, 2)):
    return tiny.processor()(images=[tiny.picture(r) for r in rows], text=[tiny.QUESTIONS[r] for r in rows])


def followed(steps):
    """What a stream yields, and what it returns."""
    seen = []
    return drain(steps, seen.append), seen


def played(**options) -> Trace:
    """A trace with a token that is taken back."""
    config = SamplerConfig(8, 8, 8, stop_tokens=(), suppress_tokens=(), revision=RevealRemask(0.25), **options)
    logits = confident([1, 2, 3, 4, 5, 6, 1, 2], [0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4])
    return sample(Table(logits), torch.full((1, 2), 5), config, **IDS).trace


# Streams.


@pytest.mark.parametrize("config", CONFIGS)
def test_a_stream_tells_each_forward_and_ends_in_the_ordinary_call(network, config):
    output, seen = followed(network.stream(**prompts(), config=config))
    called = network.generate(**prompts(), config=config)
    assert output.sequences.equal(called.sequences) and output.forwards == called.forwards
    assert tuple(event for events in seen for event in events) == output.trace.events == called.trace.events
    assert [{e.step for e in events if e.kind == COMMIT} for events in seen] == [{step} for step in range(len(seen))]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_decoder_and_the_forward_stream_the_same(network, config):
    fast = followed(network.stream(**prompts(), config=config))[1]
    plain = followed(network.stream(**prompts(), config=config, reference=True))[1]
    told = [[[(*event[:4], event.kind) for event in events] for events in seen] for seen in (fast, plain)]
    assert told[0] == told[1]


def test_a_stream_through_a_cache_counts_its_refreshes(network):
    config = replace(BASE, cache=DualCache(4), stop_tokens=())
    output, seen = followed(network.stream(**prompts(), config=config))
    assert len(seen) == 16 and output.refreshes == 4


def test_a_stream_runs_no_further_than_it_is_asked():
    denoise = Table(torch.randn(8, 10))
    config = SamplerConfig(8, 4, 8, stop_tokens=(), suppress_tokens=(MASK,))
    steps = stream(denoise, torch.full((1, 2), 5), config, **IDS)
    assert denoise.canvases == []
    for number in range(1, 4):
        (event,) = next(steps)
        assert event.step == number - 1 and len(denoise.canvases) == number
    steps.close()
    assert len(denoise.canvases) == 3


def test_nothing_is_told_where_nobody_listens(network):
    output, seen = followed(network.stream(**prompts(), config=replace(BASE, stop_tokens=()), tell=False))
    assert seen == [()] * 16 and len(output.trace.events) == 3 * 16


@pytest.mark.parametrize("preset", [SamplerConfig.official, SamplerConfig.llada])
def test_a_published_sampler_tells_everything_at_once(network, preset):
    config = preset(gen_length=8, block_length=4, steps=8)
    output, seen = followed(network.stream(**prompts((0,)), config=config))
    assert seen == [output.trace.events] and len(seen[0]) == 8


# The trace itself.


def test_what_a_stream_has_told_so_far_is_the_replay(network):
    config = replace(BASE, revision=ReMDM("cap", eta=0.5), stop_tokens=())
    output, seen = followed(network.stream(**prompts((0,)), config=config))
    assert any(event.kind == REMASK for events in seen for event in events)
    canvas = [tiny.special().mask] * 16
    for step, events in enumerate(seen):
        for event in events:
            canvas[event.position] = event.token if event.kind == COMMIT else tiny.special().mask
        assert canvas == output.trace.replay(step)
    assert canvas == output.sequences[0].tolist()


@pytest.mark.parametrize("make", [played, lambda: played(temperature=1.0), lambda: Trace((), 4, 9)])
def test_a_trace_comes_back_from_json_and_from_its_file(tmp_path, make):
    trace = make()
    assert Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace
    assert Trace.load(trace.save(tmp_path / "a" / "trace.json", about={"question": "?"})) == trace


def test_a_trace_of_a_published_sampler_that_predicts_masks_comes_back_too():
    logits = confident([1, MASK, 3, 4], [0.9, 0.8, 0.7, 0.6])
    logits[1] = torch.where(torch.arange(10) == MASK, 0.0, -5.0)
    config = SamplerConfig.official(gen_length=4, block_length=4, steps=4)

    def denoise(canvas, columns, *, unconditional=False):
        return torch.cat([torch.zeros(2, 10), logits])[columns].expand(len(canvas), -1, -1)

    trace = official_sample(denoise, torch.full((1, 2), 5), config, **IDS).trace
    assert any(event.token == MASK for event in trace.events)
    assert Trace.from_dict(trace.to_dict()) == trace


def changed(**columns) -> dict:
    return {"gen_length": 4, "mask_token_id": 9} | Trace((Event(0, 0, 1, 5, 0.5),), 4, 9).to_dict() | columns


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "a mapping of columns, not list"),
        ({"step": []}, "a trace has the keys"),
        (changed(extra=1), "a trace has the keys"),
        (changed(gen_length=-1), "gen_length is -1"),
        (changed(mask_token_id="9"), "mask_token_id is '9'"),
        (changed(step=[0, 1]), "lists of one length"),
        (changed(kind="commit"), "lists of one length"),
        (changed(position=[4]), "positions lie below gen_length 4"),
        (changed(position=[-1]), "position is -1"),
        (changed(token=[1.5]), "token is 1.5"),
        (changed(row=[True]), "row is True"),
        (changed(confidence=[1.5]), "confidence 1.5 is not between 0 and 1"),
        (changed(confidence=[float("nan")]), "confidence nan"),
        (changed(kind=["revise"]), "the kind is 'commit' or 'remask'"),
        (changed(kind=["remask"]), "takes back a token that does not stand there"),
        (Trace((Event(1, 0, 1, 5, 0.5), Event(0, 0, 2, 5, 0.5)), 4, 9).to_dict(), "steps do not decrease"),
        (Trace((Event(0, 0, 1, 5, 0.5), Event(1, 0, 1, 6, 0.5)), 4, 9).to_dict(), "writes where a token stands"),
        (Trace((Event(0, 0, 1, 5, 0.5), Event(1, 0, 1, 6, 0.5, REMASK)), 4, 9).to_dict(), "takes back a token"),
    ],
)
def test_what_cannot_have_happened_is_refused_on_reading(tmp_path, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        Trace.from_dict(value)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"format": "medv trace 1", "about": {}, "trace": value}))
    said = "NaN is no value of JSON" if sentence == "confidence nan" else sentence
    with pytest.raises(ValueError, match=f"trace.json holds no trace: .*{said}"):
        Trace.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "other", "trace": {}}'])
def test_another_file_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json holds no trace"):
        Trace.load(tmp_path / "a.json")


# The page.

NASTY = {
    1: "<script>document.title='taken'</script>",
    2: "</script><img src=x onerror=\"document.title='taken'\">",
    3: "&lt;\u2028'\"",
}


def nasty_page() -> str:
    trace = Trace(tuple(Event(i, 0, i, i + 1, 0.5) for i in range(3)), 4, 9)
    return trace_page(trace, NASTY.get, question="<script>document.title='taken'</script>", answer="<b>bold</b>")


def test_the_page_asks_for_nothing_outside():
    page = trace_page(played(), str, question="Q", answer="A", picture=tiny.picture(1))
    assert f'content="{POLICY}"' in page and "default-src 'none'" in POLICY
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|fetch\(|url\(", page)
    assert re.findall(r"src='([^']{10})", page) == ["data:image"]


def test_words_cannot_become_markup():
    page = nasty_page()
    assert page.count("</script>") == page.count("<script") == 2, "the data and the program, nothing else"
    assert "<img" not in page and "<b>" not in page and "&lt;b&gt;bold" in page
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page
    (data,) = re.findall(r"<script type='application/json' id='data'>(.*?)</script>", page, re.DOTALL)
    assert [event[3] for event in json.loads(data)["events"]] == list(NASTY.values())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_shows_the_words_and_runs_none_of_them(tmp_path):
    (tmp_path / "page.html").write_text(nasty_page(), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    command = ["chromium", *options, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "forward 3 of 3: 3 of 4 positions written" in dom, "it has played to its end"
    assert "<title>medv: &lt;script&gt;" in dom and "<img" not in dom
    assert dom.count("&lt;/script&gt;&lt;img src=x") == 3, "in the table, and in the cell and its measure"


def test_the_page_can_be_used_by_keyboard_without_motion_and_in_the_dark():
    page = trace_page(played(), str, question="Q", answer="A")
    for part in ('<button id="play"', '<input id="slider" type="range"', "aria-label", 'role="status"', ":focus-visible"):
        assert part in page
    for part in ("prefers-reduced-motion", "prefers-color-scheme: dark", "color-scheme: light dark"):
        assert part in page


def test_the_page_tells_every_event_also_as_a_table():
    trace = played()
    rows = re.findall(r"<tr><td>(\d+)</td><td>(\d+)</td><td>(\w+)</td>", trace_page(trace, str))
    assert rows == [(str(e.step + 1), str(e.position), e.kind) for e in trace.events]
    assert any(kind == "remask" for _, _, kind in rows)


def test_a_page_shows_one_row():
    trace = Trace((Event(0, 0, 0, 1, 0.5), Event(0, 1, 0, 1, 0.5)), 4, 9)
    with pytest.raises(ValueError, match=r"2: pass trace\.of_row"):
        trace_page(trace, str)
    assert "All 1 events" in trace_page(trace.of_row(1), str)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.html.gz", "a.HTM"])
def test_another_suffix_is_refused(name):
    with pytest.raises(ValueError, match=r"ends in .html or .json, or to - for the terminal"):
        trace_targets([name])


def test_a_name_that_cannot_become_a_file_is_refused_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "b.html").mkdir()
    refusals = {tmp_path / "file" / "a.html": "cannot be written", tmp_path / "b.html": "b.html is a folder"}
    for path, sentence in refusals.items():
        with pytest.raises(ValueError, match=sentence):
            trace_targets([str(path)])


def test_a_page_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.html"
    write_trace(path, played(), str, question="Q", answer="A")
    old = path.read_text()
    with pytest.raises(KeyError):
        write_trace(path, played(), {}.__getitem__, question="Q", answer="A")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"] and path.read_text() == old


@pytest.mark.parametrize("suffix", [".html", ".json"])
def test_only_a_trace_or_nothing_is_written_over(tmp_path, suffix):
    mine, ours, empty = (tmp_path / f"{name}{suffix}" for name in ("mine", "ours", "empty"))
    mine.write_text('{"format": "a list of my own"}' if suffix == ".json" else "<!doctype html><p>my page")
    empty.write_text("")
    for path in (ours, ours, empty):
        write_trace(path, played(), str, question="Q", answer="A")
    before = mine.read_text()
    with pytest.raises(ValueError, match="is no trace"):
        write_trace(mine, played(), str, question="Q", answer="A")
    assert mine.read_text() == before


# The terminal.


def terminal_text(events, words, length=4) -> str:
    out = io.StringIO()
    view = TerminalView(Console(file=out, force_terminal=True, color_system=None, width=60), length, words.__getitem__)
    with view as on_step:
        for step in events:
            on_step(step)
    return out.getvalue()


def test_the_terminal_shows_the_canvas_after_each_forward():
    events = [
        (Event(0, 0, 1, 5, 0.9), Event(0, 1, 0, 7, 0.9)),
        (Event(1, 0, 0, 6, 0.2), Event(1, 0, 0, 6, 0.2, REMASK)),
        (Event(2, 0, 0, 7, 0.3),),
    ]
    text = terminal_text(events, {5: " lung", 6: " wrong", 7: " The"})
    shown = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines() if line.strip()]
    assert shown[:6] == [
        "░ lung░░",
        "forward 1: 1 of 4 positions written",
        "↺ lung░░",
        "forward 2: 1 of 4 positions written, 1 taken back",
        " The lung░░",
        "forward 3: 2 of 4 positions written, 1 taken back",
    ]


def test_a_word_cannot_steer_the_terminal():
    class Steering:
        all_special_ids = (0,)

        def decode(self, ids):
            return {1: "a\x1b[2Jb", 2: "\n", 3: "", 0: "<|end|>"}[ids[0]]

    word = word_of(Steering())
    assert [word(token) for token in (1, 2, 3, 0)] == ["a·[2Jb", "↵", "·", "∎"]


# medv ask.


def test_ask_writes_the_traces_it_is_asked_for(tmp_path, model_dir):
    save_picture(tmp_path / "a.png", "rgb")
    files = tmp_path / "new" / "t.html", tmp_path / "t.json"
    asked = ("ask", tmp_path / "a.png", "What is <shown>?", "--model", model_dir, "--json", *SHORT)
    done = run(*asked, "--trace", files[0], "--trace", files[1])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert len(Trace.load(files[1]).commits) == answer["forwards"]
    about = json.loads(files[1].read_text())["about"]
    assert (about["question"], about["answer"]) == ("What is <shown>?", answer["text"])
    assert "What is &lt;shown&gt;?" in files[0].read_text() and "data:image/png" in files[0].read_text()
    assert json.loads(run(*asked).stdout)["text"] == answer["text"]


def test_ask_refuses_another_suffix_before_it_looks_at_anything(tmp_path):
    done = run("ask", tmp_path / "missing.png", "What?", "--model", tmp_path, "--trace", "t.txt", *SHORT)
    assert done.exit_code == 2 and "'t.txt'" in done.stderr and done.stderr.count("\n") == 1


def test_ask_draws_nothing_where_nobody_watches(tmp_path, model_dir):
    save_picture(tmp_path / "a.png", "rgb")
    asked = ("ask", tmp_path / "a.png", "What is shown?", "--model", model_dir, *SHORT)
    watched, plain = run(*asked, "--trace", "-"), run(*asked)
    assert watched.exit_code == 0 and watched.stdout == plain.stdout


def test_ask_draws_the_canvas_on_a_terminal(tmp_path, model_dir, monkeypatch):
    save_picture(tmp_path / "a.png", "rgb")
    monkeypatch.setattr("medv.cli.console", Console(force_terminal=True, width=80))
    done = run("ask", tmp_path / "a.png", "What is shown?", "--model", model_dir, "--trace", "-", *SHORT)
    assert done.exit_code == 0 and "forward 1: 1 of 4 positions written" in done.stdout


@pytest.mark.parametrize("options", [("--schedule", "threshold"), ("--schedule", "budgeted"), ("--cache", "dual")])
def test_ask_samples_as_it_is_told(tmp_path, model_dir, options):
    save_picture(tmp_path / "a.png", "rgb")
    done = run("ask", tmp_path / "a.png", "What is shown?", "--model", model_dir, "--json", *SHORT, *options)
    assert done.exit_code == 0 and json.loads(done.stdout)["forwards"] <= 4


@pytest.mark.parametrize(("option", "known"), [("--schedule", "linear, cosine"), ("--cache", "none, prefix, dual")])
def test_ask_names_the_schedules_and_caches_there_are(tmp_path, option, known):
    done = run("ask", tmp_path / "a.png", "What?", option, "magic")
    assert done.exit_code == 2 and "'magic'" in done.stderr and known in done.stderr
    assert known.split(",")[0] in CliRunner().invoke(app, ["ask", "--help"], env={"COLUMNS": "200"}).stdout
