"""`medv judge` against a real server that misbehaves: every question ends judged or with a reason, and no key is written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from stub_judge import StubJudge
from typer.testing import CliRunner

from medv.cli import app
from medv.evaluation.judge import read_judgements
from medv.evaluation.judging import Endpoint, judge_file, key_from_environment
from medv.reading import DataError

KEY = "sk-test-5fd1c0ffee"
FLAGS = {"chest_xray": True, "mri": False, "histology": False, "gross": False, "ct_scan": False}


@pytest.fixture(autouse=True)
def no_keys_of_this_machine(monkeypatch):
    for name in ("MEDV_JUDGE_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def files(folder, names):
    """A question file and an answer file; the question's text is its name, which the stub goes by."""
    about = {"fig_label": "Fig. 1", "fig_caption": "A lung.", "in_text_mention": None, "domain": FLAGS}
    questions = [
        {"question_id": n, "text": f"{name}\n<image>", "gpt4_answer": "yes", "type": "conversation", **about}
        for n, name in enumerate(names)
    ]
    answers = [{"question_id": n, "text": f"the answer to {name}"} for n, name in enumerate(names)]
    paths = folder / "q.jsonl", folder / "a.jsonl"
    for path, rows in zip(paths, (questions, answers), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def run(stub, folder, names, **options):
    settings = {"key": KEY, "delay": 0.01, "timeout": 4.0, "attempts": 3} | options
    cache = settings.pop("cache", None)
    out = folder / "j.jsonl"
    scores = judge_file(*files(folder, names), out, Endpoint(stub.url, **settings), cache=cache, quiet=True)
    return scores.to_dict(), [json.loads(line) for line in out.read_text().splitlines()]


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


TROUBLE = {
    "rate": (429, {"Retry-After": "0"}, "slow down"),
    "date": (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, "busy"),
    "error": (500, {}, "oops"),
    "slow": "slow",
    "drip": "drip",
    "cut": "cut",
    "garbage": "garbage",
    "closed": "closed",
    "range": "11 5",
    "words": "I like the second one.",
    "list": (200, {}, "[1]"),
}


def test_each_kind_of_trouble_that_passes_ends_in_a_judgement(tmp_path):
    with StubJudge(lambda name, number: TROUBLE[name] if number == 0 else "8 4") as stub:
        scores, rows = run(stub, tmp_path, TROUBLE, concurrency=8, timeout=4.0)
    assert scores["overall"] == 50.0 and scores["counts"]["chest_xray"] == len(TROUBLE) and not scores["unjudged"]
    assert set(stub.asked.values()) == {2}
    assert [row["question_id"] for row in rows] == list(range(len(TROUBLE)))


def test_each_kind_of_trouble_that_stays_is_listed_with_its_reason_and_the_raw_text(tmp_path):
    with StubJudge(lambda name, _: TROUBLE.get(name, "10 5")) as stub:
        scores, rows = run(stub, tmp_path, [*TROUBLE, "good"], concurrency=8, attempts=2, timeout=3.0)
    assert scores["overall"] == 50.0 and scores["counts"]["overall"] == 1
    reasons = {name: row["reason"] for name, row in zip(TROUBLE, rows, strict=False)}
    assert len(scores["unjudged"]) == len(TROUBLE) == len(reasons)
    said = {"rate": "429", "error": "500", "drip": "no whole reply", "cut": "broke", "range": "between 1 and 10"}
    assert all(word in reasons[name] for name, word in said.items())
    assert rows[list(TROUBLE).index("words")]["result"] == "I like the second one."
    assert read_judgements(tmp_path / "j.jsonl").to_dict() == scores


def test_a_second_run_asks_only_what_is_not_judged_and_another_file_with_the_same_answers_nothing(tmp_path):
    with StubJudge(lambda name, number: "nonsense" if name == "b" and number < 2 else "9 3") as stub:
        assert len(run(stub, tmp_path, "abc", attempts=2)[0]["unjudged"]) == 1
        assert not run(stub, tmp_path, "abc", attempts=2)[0]["unjudged"]
        assert stub.asked == {"a": 1, "b": 3, "c": 1}
        (tmp_path / "j.jsonl").unlink()
        run(stub, tmp_path, "abc")
        assert stub.asked.total() == 5
        run(stub, tmp_path, "abc", model="another")
        assert stub.asked.total() == 8


def test_the_key_is_sent_and_is_in_no_file_even_if_the_endpoint_repeats_it(tmp_path):
    replies = {"a": f"8 4\nyour key is {KEY}", "b": (400, {}, f"bad key {KEY}"), "c": f"{KEY} scores"}
    with StubJudge(lambda name, _: replies[name]) as stub:
        scores, rows = run(stub, tmp_path, "abc", attempts=1)
    assert {sent["Authorization"] for sent in stub.headers} == {f"Bearer {KEY}"}
    assert KEY.encode() not in everything_written(tmp_path) and KEY not in json.dumps(scores)
    assert "[key]" in rows[0]["result"] and KEY not in repr(Endpoint(stub.url, key=KEY))


def test_a_refused_key_ends_the_run_without_asking_the_rest(tmp_path):
    with StubJudge(lambda *_: (401, {}, "who are you")) as stub:
        scores, _ = run(stub, tmp_path, [f"q{n}" for n in range(20)], concurrency=1)
    assert stub.asked.total() == 1
    assert len(scores["unjudged"]) == 20 and all("401" in item["reason"] for item in scores["unjudged"])


def test_a_wait_beyond_patience_is_a_reason_and_not_a_wait(tmp_path):
    with StubJudge(lambda *_: (429, {"Retry-After": "86400"}, "tomorrow")) as stub:
        scores, _ = run(stub, tmp_path, ["a"])
    assert "86400 s" in scores["unjudged"][0]["reason"] and stub.asked.total() == 1


def test_questions_are_asked_at_once_but_not_more_than_allowed(tmp_path):
    def plan(*_):
        time.sleep(0.2)
        return "8 8"

    with StubJudge(plan) as stub:
        run(stub, tmp_path, [f"q{n}" for n in range(9)], concurrency=3)
    assert 2 <= stub.most <= 3


def test_texts_that_are_no_proper_unicode_stop_nothing(tmp_path):
    questions, answers = files(tmp_path, "ab")
    answers.write_text(answers.read_text().replace("the answer to a", "half \\ud800"))
    with StubJudge(lambda name, _: "8 8\nhalf \ud800" if name == "a" else "8 8\ngut – ja") as stub:
        scores = judge_file(questions, answers, tmp_path / "j.jsonl", Endpoint(stub.url), quiet=True).to_dict()
    assert scores["counts"]["overall"] == 2


def test_nobody_listening_leaves_every_question_unjudged(tmp_path):
    with StubJudge(lambda *_: "8 8") as stub:
        pass
    scores, _ = run(stub, tmp_path, "ab", attempts=2)
    assert [item["reason"][:30] for item in scores["unjudged"]] == ["the endpoint cannot be reached"] * 2


def test_answers_that_are_missing_are_listed_and_answers_to_nothing_are_refused(tmp_path):
    with StubJudge(lambda *_: "8 8") as stub:
        questions, answers = files(tmp_path, "abc")
        lines = answers.read_text().splitlines(keepends=True)
        answers.write_text("".join(lines[:2]))
        scores = judge_file(questions, answers, tmp_path / "j.jsonl", Endpoint(stub.url), quiet=True).to_dict()
        assert scores["counts"]["overall"] == 2 and "no answer" in scores["unjudged"][0]["reason"]
        answers.write_text("".join([*lines, json.dumps({"question_id": 99, "text": "x"}) + "\n"]))
        with pytest.raises(DataError, match="99"):
            judge_file(questions, answers, tmp_path / "j.jsonl", Endpoint(stub.url), quiet=True)


def test_a_killed_run_asks_only_the_remaining_questions(tmp_path):
    names = [f"q{n}" for n in range(12)]
    questions, answers = files(tmp_path, names)
    out = tmp_path / "j.jsonl"

    def plan(name, number):
        time.sleep(0.1)
        return "slow" if name == "q6" and number == 0 else "10 7"

    with StubJudge(plan) as stub:
        command = [sys.executable, "-m", "medv.cli", "judge", "--questions", questions, "--answers", answers]
        command += ["--out", out, "--base-url", stub.url, "--concurrency", "1", "--json"]
        environment = os.environ | {"OPENAI_API_KEY": KEY}
        process = subprocess.Popen(
            [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while stub.asked["q6"] == 0 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(out.read_text().splitlines()) == len(names)  # whole, though the run was killed
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["counts"]["overall"] == len(names)
    assert stub.asked == {name: 2 if name == "q6" else 1 for name in names}
    assert KEY.encode() not in everything_written(tmp_path) and KEY not in done.stdout + done.stderr


def test_the_key_comes_from_the_environment_and_a_bad_one_is_not_repeated(monkeypatch):
    assert key_from_environment() is None
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert key_from_environment() == KEY
    monkeypatch.setenv("MEDV_JUDGE_KEY", "clé secrète")
    with pytest.raises(ValueError, match="MEDV_JUDGE_KEY") as raised:
        key_from_environment()
    assert "secr" not in str(raised.value)


@pytest.mark.parametrize("url", ["localhost:1/v1", "ftp://x/v1", "http://me:pw@x/v1", "http://x/v1?key=1", ""])
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url):
    with pytest.raises(ValueError, match="base URL"):
        Endpoint(url)


def test_the_command_needs_a_key_for_the_public_endpoint_and_ends_with_1_where_a_question_is_unjudged(tmp_path):
    questions, answers = files(tmp_path, "ab")
    options = ["judge", "--questions", questions, "--answers", answers, "--out", tmp_path / "j.jsonl", "--attempts", 1]
    done = CliRunner().invoke(app, [str(option) for option in options])
    assert done.exit_code == 2 and "OPENAI_API_KEY" in done.stderr
    with StubJudge(lambda name, _: "8 8" if name == "a" else "0 0") as stub:
        done = CliRunner().invoke(app, [str(option) for option in [*options, "--base-url", stub.url]])
    assert done.exit_code == 1 and "unjudged 1:" in done.stdout
