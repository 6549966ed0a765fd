"""`medv judge` against a real server that misbehaves: every question ends judged or with a reason, and no key is written."""

import asyncio
import json
import math
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time

import pytest
from damaged import files
from launched import start_command
from stub_judge import StubJudge, completion, error
from typer.testing import CliRunner

from medv.cli import app
from medv.evaluation.judge import read_judgements
from medv.evaluation.judge_client import Endpoint, key_from_environment
from medv.evaluation.judging import judge_file
from medv.reading import DataError

PROXIES = "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"
KEY = "sk-test-5fd1c0ffee"


@pytest.fixture(autouse=True)
def no_keys_of_this_machine(monkeypatch):
    for name in ("MEDV_JUDGE_KEY", "OPENAI_API_KEY", *PROXIES, *(name.lower() for name in PROXIES)):
        monkeypatch.delenv(name, raising=False)


def run(stub, folder, names, **options):
    settings = {"key": KEY, "delay": 0.01, "timeout": 3.0, "attempts": 3} | options
    cache = settings.pop("cache", None)
    out = folder / "j.jsonl"
    scores = judge_file(*files(folder, names), out, Endpoint(stub.url, **settings), cache=cache, quiet=True)
    return scores.to_dict(), [json.loads(line) for line in out.read_text().splitlines()]


def everything_written(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


TROUBLE = {
    "rate": (429, {"Retry-After": "0"}, "slow down"),
    "date": (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, "busy"),
    "year": (503, {"Retry-After": "Wed, 21 Oct 20150000000000 07:28:00 GMT"}, "busy"),
    "negative": (429, {"Retry-After": "-5"}, "slow down"),
    "no number": (429, {"Retry-After": "nan"}, "slow down"),
    "error": (500, {}, "oops"),
    "page": (502, {"Content-Type": "text/html"}, "<html>Bad Gateway</html>"),
    "hidden": {"error": {"message": "Provider returned error", "code": 502}},
    "within": {"choices": [{"error": {"message": "overloaded", "code": 503}, "message": {"content": ""}}]},
    "slow": "slow",
    "headers": "headers",
    "drip": "drip",
    "forever": "forever",
    "giant": "giant",
    "bomb": "bomb",
    "cut": "cut",
    "garbage": "garbage",
    "closed": "closed",
    "deep": (200, {}, "[" * 200_000),
    "list": (200, {}, "[1]"),
    "none": {"choices": []},
    "null": {"choices": None, "error": None},
    "flat": {"choices": [{"message": "8 4"}]},
}


@pytest.fixture
def patience(tmp_path_factory) -> int:
    """A time-out in seconds that every good reply keeps, however busy the machine is: ten times what all of them take."""
    begun = time.monotonic()
    with StubJudge(lambda *_: "8 4") as stub:
        run(stub, tmp_path_factory.mktemp("good"), TROUBLE, concurrency=8, timeout=60.0)
    return min(25, max(3, math.ceil(10 * (time.monotonic() - begun))))


@pytest.mark.slow
def test_each_kind_of_trouble_that_passes_ends_in_a_judgement(tmp_path, patience):
    with StubJudge(lambda name, number: TROUBLE[name] if number == 0 else "8 4") as stub:
        scores, rows = run(stub, tmp_path, TROUBLE, concurrency=8, timeout=float(patience))
    assert not scores["unjudged"] and scores["overall"] == 50.0 and scores["counts"]["chest_xray"] == len(TROUBLE)
    assert set(stub.asked.values()) == {2}
    assert [row["question_id"] for row in rows] == list(range(len(TROUBLE)))


@pytest.mark.slow
def test_each_kind_of_trouble_that_stays_is_listed_with_its_reason(tmp_path, patience):
    started = time.monotonic()
    with StubJudge(lambda name, _: TROUBLE.get(name, "10 5")) as stub:
        scores, rows = run(stub, tmp_path, [*TROUBLE, "good"], concurrency=8, attempts=2, timeout=float(patience))
    assert scores["overall"] == 50.0 and scores["counts"]["overall"] == 1
    reasons = {name: row["reason"] for name, row in zip(TROUBLE, rows, strict=False)}
    assert len(scores["unjudged"]) == len(TROUBLE) == len(reasons)
    said = {"rate": "429", "error": "500", "page": "502", "cut": "broke", "bomb": "compressed", "giant": "1048576 bytes"}
    said |= dict.fromkeys(("slow", "headers", "drip", "forever"), f"no whole reply in {patience} s")
    said["hidden"] = "Provider returned"
    said |= dict.fromkeys(("garbage", "deep", "list", "none", "null", "flat"), "not a chat completion")
    assert {name: word for name, word in said.items() if word not in reasons[name]} == {}
    assert read_judgements(tmp_path / "j.jsonl").to_dict() == scores
    assert time.monotonic() - started < 13 * patience  # no endpoint outlives the time-out


TEXT = "8 7\n\nAssistant 2 is shorter."
SPOKEN = {
    "plain": TEXT,
    "parts": [{"type": "text", "text": "8 7\n"}, {"type": "text", "text": "because"}],
    "thinking part": [{"type": "thinking", "thinking": [{"type": "text", "text": "1 2"}]}, {"type": "text", "text": TEXT}],
    "thought": f"<think>\n9 9\n</think>\n\n{TEXT}",
    "fence": f"```\n{TEXT}\n```",
    "label": "Assistant 1: 8, Assistant 2: 7",
    "of ten": "8/10 7/10",
    "reasoning beside it": completion(TEXT, reasoning_content="1 2", refusal=None, tool_calls=None),
    "reasoning by its other name": completion(TEXT, reasoning="1 2", annotations=[]),
    "cut after the scores": completion("8 7\nAssistant 2 is", finish="length"),
    "without a finish": {"choices": [{"message": {"content": TEXT}}]},
    "with more fields": completion(TEXT) | {"error": None, "usage": None, "prompt_filter_results": [{}], "object": None},
}


def test_each_dialect_of_a_judge_is_read(tmp_path):
    with StubJudge(lambda name, _: SPOKEN[name] if isinstance(SPOKEN[name], dict) else completion(SPOKEN[name])) as stub:
        scores, rows = run(stub, tmp_path, SPOKEN)
        assert scores["overall"] == 87.5 and scores["counts"]["overall"] == len(SPOKEN) and not scores["unjudged"]
        run(stub, tmp_path, SPOKEN)
    assert set(stub.asked.values()) == {1}
    assert "9 9" in rows[list(SPOKEN).index("thought")]["result"]  # the text is kept as it came
    assert all(set(body) == {"model", "messages", "temperature"} and body["temperature"] == 0 for body in stub.bodies)


UNREAD = {
    "words": ("I like the second one.", "two scores are needed"),
    "range": ("11 5", "between 1 and 10"),
    "one score": ("8/10", "'8/10'"),
    "still thinking": (completion("<think>8 7\n\n", finish="length"), "ends within <think>"),
    "torn": (completion("8 1", finish="length"), "it ended by 'length'"),
    "filtered": (completion("", finish="content_filter"), "content_filter"),
    "no text": (completion(None, finish="length", reasoning_content="hm, 8 7"), "no text (it ended by 'length')"),
    "refusal": (completion(None, refusal="I cannot help with that."), "refuses ('I cannot help"),
    "refusal part": (completion([{"type": "refusal", "refusal": "No."}]), "refuses ('No.')"),
    "call": (completion(None, finish="tool_calls", tool_calls=[{}]), "no text"),
    "empty": (completion([]), "no text"),
    "too long": (error(400, "maximum context length is 8192 tokens", code="context_length_exceeded"), "context length"),
    "policy": (error(400, "triggering the content management policy", code="content_filter"), "policy"),
    "moderated": (error(403, "input was flagged", metadata={"reasons": ["x"]}), "flagged"),
    "detail": ((422, {}, json.dumps({"detail": [{"loc": ["body"], "msg": "too long"}]})), "too long"),
}


def test_what_asking_again_cannot_mend_is_asked_once_and_listed_with_the_raw_text(tmp_path):
    with StubJudge(lambda name, _: UNREAD[name][0]) as stub:
        scores, rows = run(stub, tmp_path, UNREAD)
    assert set(stub.asked.values()) == {1} and len(stub.asked) == len(UNREAD) == len(scores["unjudged"])
    assert not [row["reason"] for row, (_, word) in zip(rows, UNREAD.values(), strict=True) if word not in row["reason"]]
    assert rows[0]["result"] == "I like the second one."


def test_a_judge_with_a_temperature_is_asked_again_for_scores(tmp_path):
    with StubJudge(lambda _, number: "well" if number == 0 else "8 4") as stub:
        scores, _ = run(stub, tmp_path, "a", temperature=None)
    assert scores["overall"] == 50.0 and all(set(body) == {"model", "messages"} for body in stub.bodies)


QUOTA = "You exceeded your current quota, please check your plan and billing details."
FINAL = {
    "quota": error(429, QUOTA, type="insufficient_quota", code="insufficient_quota", headers={"Retry-After": "1"}),
    "quota in plain words": (429, {}, "insufficient_quota"),
    "quota of a proxy": error(429, f"litellm.RateLimitError: insufficient_quota - {QUOTA}", code="429"),
    "quota under another status": {"error": {"message": QUOTA, "code": "insufficient_quota"}},
    "credits": error(402, "Insufficient credits", code=402),
    "credits under another status": {"error": {"message": "more credits", "code": 402}},
    "key": error(401, "Incorrect API key provided", code="invalid_api_key"),
    "region": (403, {}, "<html>forbidden</html>"),
    "model": error(404, "The model `x` does not exist", code="model_not_found"),
    "deployment": error(404, "The API deployment for this resource does not exist", code="DeploymentNotFound"),
    "model to pull": (404, {}, json.dumps({"error": 'model "x" not found, try pulling it first'})),
    "model of a router": error(400, "x is not a valid model ID", code=400),
    "flat model": (404, {}, json.dumps({"object": "error", "message": "The model `x` does not exist.", "code": 404})),
    "no path": (404, {}, json.dumps({"detail": "Not Found"})),
    "method": (405, {}, ""),
    "temperature": error(400, "Unsupported value: 'temperature' does not support 0 with this model.", param="temperature"),
    "temperature in plain words": (400, {}, "temperature is deprecated for this model"),
    "elsewhere": (307, {"Location": "http://127.0.0.1:1/v1/chat/completions"}, ""),
    "page elsewhere": (302, {"Location": "/login"}, "<html>"),
    "tomorrow": (429, {"Retry-After": "86400"}, "tomorrow"),
    "never": (503, {"Retry-After": "1e999"}, "never"),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_holds_for_every_question_stops_the_run_at_once_and_keeps_what_is_done(name, tmp_path):
    with StubJudge(lambda question, _: "8 4" if question == "q0" else FINAL[name]) as stub:
        scores, rows = run(stub, tmp_path, [f"q{n}" for n in range(20)], concurrency=1)
    assert stub.asked.total() == 2 and scores["overall"] == 50.0 and len(scores["unjudged"]) == 19
    assert len({row["reason"] for row in rows[1:]}) == 1
    assert "temperature" not in name or "--temperature none" in rows[1]["reason"]


def test_a_run_that_was_stopped_goes_on_with_what_is_left(tmp_path):
    with StubJudge(lambda question, _: "8 4" if question == "q0" else FINAL["quota"]) as stub:
        run(stub, tmp_path, [f"q{n}" for n in range(20)], concurrency=1)
        stub.plan = lambda *_: "8 4"
        assert not run(stub, tmp_path, [f"q{n}" for n in range(20)])[0]["unjudged"]
    assert stub.asked == {f"q{n}": 2 if n == 1 else 1 for n in range(20)}


def test_a_second_run_asks_only_what_is_not_judged_and_another_file_with_the_same_answers_nothing(tmp_path):
    with StubJudge(lambda name, number: "nonsense" if name == "b" and number < 1 else "9 3") as stub:
        assert len(run(stub, tmp_path, "abc")[0]["unjudged"]) == 1
        assert not run(stub, tmp_path, "abc")[0]["unjudged"]
        assert stub.asked == {"a": 1, "b": 2, "c": 1}
        (tmp_path / "j.jsonl").unlink()
        run(stub, tmp_path, "abc")
        assert stub.asked.total() == 4
        (tmp_path / "j.jsonl").unlink()
        run(stub, tmp_path, "abc", model="another")
        assert stub.asked.total() == 7


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "another"}, "judge gpt-4.1-mini, now another"),
        ({"temperature": None}, "temperature 0.0, now None"),
        ({"base_url": "http://127.0.0.1:1/v1"}, "base_url changed"),
        ({"answer": "another answer"}, "answers changed"),
        ({"question": "gpt4"}, "questions changed"),
        ({"prompt": "Be kind."}, "prompt changed"),
    ],
)
def test_a_file_goes_on_only_with_the_same_judge_prompt_questions_and_answers(change, named, tmp_path, monkeypatch):
    questions, answers = files(tmp_path, "ab")
    out = tmp_path / "j.jsonl"
    with StubJudge(lambda *_: "8 4") as stub:
        judge_file(questions, answers, out, Endpoint(stub.url), quiet=True)
        if "answer" in change:
            answers.write_text(answers.read_text().replace("the answer to b", change.pop("answer")))
        if "question" in change:
            questions.write_text(questions.read_text().replace('"yes"', f'"{change.pop("question")}"'))
        if "prompt" in change:
            monkeypatch.setattr("medv.evaluation.judge.INSTRUCTION", change.pop("prompt"))
        before = everything_written(tmp_path)
        with pytest.raises(ValueError, match=named):
            judge_file(questions, answers, out, Endpoint(**{"base_url": stub.url} | change), quiet=True)
    assert everything_written(tmp_path) == before and stub.asked.total() == 2
    assert not any("Authorization" in sent for sent in stub.headers)  # there is no key


OTHERS = {
    "notes": "my notes",
    "answers of another": '{"question_id": 0, "text": "an answer"}\n',
    "torn": '{"question_id": 1, "ans',
    "blank": " ",
    "run of another": '{"run": {"made_by": "medv generate"}, "text": "an answer"}\n',
    "run that is none": '{"run": "medv judge", "result": null}\n',
}


@pytest.mark.parametrize("what", ["questions", "answers", "link", "folder", *OTHERS])
def test_a_file_that_is_not_ours_is_refused_and_not_changed(what, tmp_path):
    questions, answers = files(tmp_path, "ab")
    out = {"questions": questions, "answers": answers}.get(what, tmp_path / "out")
    if what == "link":
        out.symlink_to(answers)
    elif what == "folder":
        out.mkdir()
    elif what in OTHERS:
        out.write_text(OTHERS[what])
    before = everything_written(tmp_path)
    with StubJudge(lambda *_: "8 4") as stub, pytest.raises(ValueError, match=re.escape(str(out))):
        judge_file(questions, answers, out, Endpoint(stub.url), quiet=True)
    assert everything_written(tmp_path) == before and not stub.asked


def test_the_key_is_sent_and_is_in_no_file_even_if_the_endpoint_repeats_it(tmp_path):
    replies = {"a": f"8 4\nyour key is {KEY}", "b": (400, {}, f"bad key {KEY}"), "c": f"{KEY} scores"}
    with StubJudge(lambda name, _: replies[name]) as stub:
        scores, rows = run(stub, tmp_path, "abc", attempts=1)
    assert {sent["Authorization"] for sent in stub.headers} == {f"Bearer {KEY}"}
    assert KEY.encode() not in everything_written(tmp_path) and KEY not in json.dumps(scores)
    assert "[key]" in rows[0]["result"] and KEY not in repr(Endpoint(stub.url, key=KEY))


def test_questions_are_asked_at_once_but_not_more_than_allowed(tmp_path):
    def plan(*_):
        time.sleep(0.2)
        return "8 8"

    with StubJudge(plan) as stub:
        run(stub, tmp_path, [f"q{n}" for n in range(9)], concurrency=3)
    assert 2 <= stub.most <= 3


def test_replies_that_are_no_proper_unicode_stop_nothing(tmp_path):
    with StubJudge(lambda name, _: "8 8\nhalf \ud800" if name == "a" else "8 8\ngut – ja") as stub:
        scores, _ = run(stub, tmp_path, "ab")
    assert scores["counts"]["overall"] == 2


@pytest.mark.parametrize("text", [None, "", 7, ["What?"]])
def test_a_question_without_text_is_an_error_with_its_row(text, tmp_path):
    questions, answers = files(tmp_path, "ab")
    questions.write_text(questions.read_text().replace('"b\\n<image>"', json.dumps(text)))
    with pytest.raises(DataError, match=r"line 2.*'text' is not a text"):
        judge_file(questions, answers, tmp_path / "j.jsonl", Endpoint("http://127.0.0.1:1/v1"), quiet=True)


def test_nobody_listening_leaves_every_question_unjudged(tmp_path):
    with StubJudge(lambda *_: "8 8") as stub:
        pass
    scores, _ = run(stub, tmp_path, "ab", attempts=2)
    assert [item["reason"][:30] for item in scores["unjudged"]] == ["the endpoint cannot be reached"] * 2


def test_a_redirect_gets_neither_key_nor_question(tmp_path):
    with StubJudge(lambda *_: "8 8") as other:
        away = (307, {"Location": f"{other.url}/chat/completions"}, "")
        with StubJudge(lambda *_: away) as stub:
            scores, _ = run(stub, tmp_path, "ab")
    assert len(scores["unjudged"]) == 2 and not other.asked and not other.headers


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


def test_answers_without_ids_belong_to_the_questions_by_their_order_if_there_are_as_many(tmp_path):
    questions, answers = files(tmp_path, "abc")
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    for row, number in zip(asked, (2, 0, 1), strict=True):  # numbers that rows could have
        row["question_id"] = number
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    texts = ["to the first", "to the second", "to the third"]
    with StubJudge(lambda *_: "8 8") as stub:
        for given, words in (
            (texts[:2], "2 answers without ids to 3"),
            ([*texts[:2], ("third", 0)], "line 1: no 'question_id'"),
        ):
            rows = [{"text": row} if isinstance(row, str) else {"text": row[0], "question_id": row[1]} for row in given]
            answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with pytest.raises(DataError, match=words):
                judge_file(questions, answers, tmp_path / "j.jsonl", Endpoint(stub.url), quiet=True)
        answers.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        judge_file(questions, answers, tmp_path / "j.jsonl", Endpoint(stub.url), quiet=True)
    judged = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row["ans2"]) for row in judged] == list(zip((2, 0, 1), texts, strict=True))


def command(stub, folder, names, *options):
    """The command as the README has it."""
    questions, answers = files(folder, names)
    line = ["judge", "--questions", questions, "--answers", answers, "--out", folder / "j.jsonl", "--judge-model", "NAME"]
    return [str(part) for part in (*line, "--base-url", getattr(stub, "url", stub), *options)]


def started(*line):
    """The command in a process of its own."""
    line, environment = [sys.executable, "-m", "medv", *command(*line)], os.environ | {"OPENAI_API_KEY": KEY}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=environment, **streams)


def begun(stub, folder, *line):
    """The command in a process of its own that is soon there, and the file of its errors."""
    said = folder.with_name(f"{folder.name}-said")
    process = start_command(said, *command(stub, folder, *line), OPENAI_API_KEY=KEY)
    return process, said.with_name(f"{said.name}.err")


def told(process):
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err and KEY not in out + err
    return process.returncode, " ".join(out.split()), err


def spoken(*line):
    """The command in this process: its exit code, output and errors."""
    done = CliRunner().invoke(app, command(*line))
    assert "Traceback" not in done.stderr and isinstance(done.exception, SystemExit | None)
    return done.exit_code, " ".join(done.stdout.split()), done.stderr


@pytest.mark.slow
def test_the_command_of_the_readme_prints_its_table(tmp_path):
    with StubJudge(lambda *_: "8 4") as stub:
        code, out, err = told(started(stub, tmp_path, "ab"))
    assert code == 0, err
    assert "overall (2 questions)" in out and "50.0" in out and "judge NAME, temperature 0" in out
    done = CliRunner().invoke(app, ["evaluate", "judge", "--judgements", str(tmp_path / "j.jsonl")])
    assert done.exit_code == 0 and "overall (2 questions)" in done.stdout


def test_a_judge_that_refuses_a_temperature_judges_without_and_the_table_says_so(tmp_path):
    with StubJudge(lambda *_: "8 4") as stub:
        plan = stub.plan
        stub.plan = lambda *asked: FINAL["temperature"] if "temperature" in stub.bodies[-1] else plan(*asked)
        code, _, err = spoken(stub, tmp_path, "a")
        assert code == 2 and "--temperature none" in err
        code, out, _ = spoken(stub, tmp_path, "a", "--temperature", "none")
    assert code == 0 and "temperature left out" in out
    assert json.loads((tmp_path / "j.jsonl").read_text())["run"]["temperature"] is None


def test_a_quota_that_is_used_up_is_one_sentence_and_the_rest_is_not_asked(tmp_path):
    with StubJudge(lambda name, _: "8 4" if name == "q0" else FINAL["quota"]) as stub:
        code, out, err = spoken(stub, tmp_path, [f"q{n}" for n in range(8)], "--concurrency", "1")
    assert code == 2 and stub.asked.total() == 2 and "overall (1 questions)" in out
    assert err.count("medv: ") == 1 and "quota" in err and "1 of 8 questions are judged" in err


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:1"}, "ALL_PROXY"),
        ({"HTTP_PROXY": "http://127.0.0.1:port"}, "HTTP_PROXY"),
        ({"HTTPS_PROXY": "ftp://127.0.0.1:1"}, "HTTPS_PROXY"),
    ],
)
def test_proxies_that_cannot_be_used_are_one_sentence(settings, named, tmp_path, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with StubJudge(lambda *_: "8 4") as stub:
        code, _, err = spoken(stub, tmp_path, "a", "--attempts", 1)
    assert code == 2 and named in err and not stub.asked and not (tmp_path / "j.jsonl").exists()


def test_a_network_without_proxy_is_no_trouble(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "fe80::/10,::1,10.0.0.0/8,[fd00::1],*.local,localhost")
    with StubJudge(lambda *_: "8 4") as stub:
        assert spoken(stub, tmp_path, "a")[0] == 0


def test_a_name_without_address_and_a_port_without_tls_are_one_sentence(tmp_path):
    with StubJudge(lambda *_: "8 4") as stub:
        for url in ("http://judge.invalid/v1", stub.url.replace("http:", "https:")):
            code, _, err = spoken(url, tmp_path, "ab", "--attempts", 1)
            assert code == 2 and "cannot be reached" in err and err.count("medv: ") == 1


def test_a_certificate_that_nobody_vouches_for_is_one_sentence(tmp_path):
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    made = shutil.which("openssl") and subprocess.run([*make, "-keyout", key, "-out", certificate], capture_output=True)
    if not made or made.returncode:
        pytest.skip("no openssl here to make a certificate with")
    with StubJudge(lambda *_: "8 4") as stub:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        stub.server.socket = context.wrap_socket(stub.server.socket, server_side=True)
        code, _, err = spoken(stub.url.replace("http:", "https:"), tmp_path, "ab")
    assert code == 2 and "certificate" in err and "cannot be reached" in err and not stub.asked


@pytest.mark.slow
def test_an_interrupted_run_ends_soon_and_keeps_what_is_finished(tmp_path):
    with StubJudge(lambda name, _: "8 4" if name == "a" else "slow") as stub:
        process, errors = begun(stub, tmp_path, "ab", "--concurrency", 1)
        while stub.asked["b"] == 0 and process.is_alive():
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        since = time.monotonic()
        process.join(60)
        assert process.exitcode == 130 and time.monotonic() - since < 15.0  # the request would take 30 s
        assert not [word for word in ("Traceback", KEY) if word in errors.read_text()]
        rows = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
        assert [row["result"] for row in rows] == ["8 4", None]


@pytest.mark.slow
def test_a_run_whose_error_stream_is_closed_ends_and_keeps_what_is_finished(tmp_path):
    def plan(name, number):
        if name == "b":
            process.stderr.close()  # the bar cannot be drawn any more
            time.sleep(0.3)
        return "8 4"

    with StubJudge(plan) as stub:
        process = started(stub, tmp_path, "abc", "--concurrency", 1)
        assert process.wait(timeout=60) != 0
    rows = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and rows[0]["result"] == "8 4"


@pytest.mark.slow
def test_two_runs_on_one_file_are_one_too_many(tmp_path):
    with StubJudge(lambda *_: "slow") as stub:
        first, _ = begun(stub, tmp_path, "ab")
        while not stub.asked and first.is_alive():
            time.sleep(0.02)
        before = everything_written(tmp_path)
        code, _, err = spoken(stub, tmp_path, "ab")
        assert code == 2 and "another process" in err and everything_written(tmp_path) == before
        first.kill()
        first.join()


@pytest.mark.slow
def test_a_killed_run_asks_only_the_remaining_questions(tmp_path):
    names = [f"q{n}" for n in range(12)]

    def plan(name, number):
        time.sleep(0.1)
        return "slow" if name == "q6" and number == 0 else "10 7"

    with StubJudge(plan) as stub:
        process, errors = begun(stub, tmp_path, names, "--concurrency", 1, "--json")
        while stub.asked["q6"] == 0 and process.is_alive():
            time.sleep(0.02)
        process.kill()
        process.join()
        assert not [word for word in ("Traceback", KEY) if word in errors.read_text()]
        assert len((tmp_path / "j.jsonl").read_text().splitlines()) == len(names)  # whole, though the run was killed
        code, out, _ = spoken(stub, tmp_path, names, "--concurrency", "1", "--json")
    assert code == 0 and json.loads(out)["counts"]["overall"] == len(names)
    assert stub.asked == {name: 2 if name == "q6" else 1 for name in names}
    assert KEY.encode() not in everything_written(tmp_path)


def test_a_notebook_with_a_loop_of_its_own_can_judge(tmp_path):
    async def cell(stub):
        return run(stub, tmp_path, "ab")[0]

    with StubJudge(lambda *_: "8 4") as stub:
        assert asyncio.run(cell(stub))["overall"] == 50.0


def test_the_key_comes_from_the_environment_and_a_bad_one_is_not_repeated(monkeypatch):
    assert key_from_environment() is None
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert key_from_environment() == KEY
    monkeypatch.setenv("MEDV_JUDGE_KEY", "clé secrète")
    with pytest.raises(ValueError, match="MEDV_JUDGE_KEY") as raised:
        key_from_environment()
    assert "secr" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:99999/v1",
        "http://localhost:-1/v1",
        "localhost:1/v1",
        "ftp://x/v1",
        "http://me:pw@x/v1",
        "http://x/v1?key=1",
        "",
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url):
    with pytest.raises(ValueError, match="base URL"):
        Endpoint(url)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": float("nan")}, {"temperature": -1.0}, {"timeout": float("inf")}, {"timeout": 0}, {"concurrency": 0}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"temperature|timeout"):
        Endpoint("http://127.0.0.1:1/v1", **settings)


def test_the_command_needs_a_key_for_the_public_endpoint_and_ends_with_1_where_a_question_is_unjudged(tmp_path):
    questions, answers = files(tmp_path, "ab")
    options = ["judge", "--questions", questions, "--answers", answers, "--out", tmp_path / "j.jsonl", "--attempts", 1]
    done = CliRunner().invoke(app, [str(option) for option in options])
    assert done.exit_code == 2 and "OPENAI_API_KEY" in done.stderr
    with StubJudge(lambda name, _: "8 8" if name == "a" else "0 0") as stub:
        done = CliRunner().invoke(app, [str(option) for option in [*options, "--base-url", stub.url]])
    assert done.exit_code == 1 and "unjudged 1:" in done.stdout
