"""The cases of `fuzz`: good files of each kind, and what can be done to them."""

import io
import json
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

import medv

TINY = Path(medv.__file__).parent / "weights/tiny_model"
SHORT = ("--gen-length", "4", "--block-length", "4", "--steps", "1")

_ODD_TEXTS = (
    *(
        "",
        " ",
        "\n",
        "None",
        "null",
        "nan",
        "1e999",
        "-1",
        "12.0",
        "yes",
        "No ",
        "\x1b[2J\x1b]0;x\x07",
        "\u202eevil",
        "a\0b",
        "\ud800",
    ),
    *(
        "../../etc/hostname",
        "/dev/zero",
        "/etc/hostname",
        "C:\\x",
        ".",
        "..",
        "i.png/..",
        "i.png",
        "~",
        "[red]x[/red]",
        "<image>",
    ),
    *("{0}", "%s", "é" * 300, "word " * 4000, "9" * 5000, "8/10", "<think>", "normal\u00a0", "\ufeff"),
)
_ODD_NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    512,
    1 << 16,
    999_999,
    10**8,
    1 << 31,
    1 << 63,
    10**30,
    -(10**9),
    0.5,
    -0.0,
    1e308,
    1e-320,
)
_NO_JSON = (math.nan, math.inf, -math.inf)
_DEEP = json.loads("[" * 90 + "]" * 90)
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_ODD_NUMBERS + _NO_JSON),
    st.sampled_from(_ODD_TEXTS),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
    st.sampled_from(([], {}, [None], [[]], [1, "a"], {"a": {}}, {"": 0}, ["yes"], _DEEP)).map(deepcopy),
)


def _places(value, here=()):
    """The path of every part of a JSON value."""
    yield here
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _places(part, (*here, key))


@st.composite
def mutated(draw, value):
    """The JSON value with up to three parts replaced, removed, renamed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 1, 2, 3)))):
        places = [place for place in _places(value) if place]
        if not places:
            return value
        *way, last = draw(st.sampled_from(places))
        holder = value
        for key in way:
            holder = holder[key]
        match draw(st.sampled_from(("odd", "odd", "near", "remove", "add"))):
            case "odd":
                holder[last] = draw(odd)
            case "near" if isinstance(holder[last], int | float):
                holder[last] = draw(st.sampled_from((-1, 0, 0.5, 2, 1000))) * holder[last]
            case "remove":
                del holder[last]
            case _ if isinstance(holder, dict):
                holder[draw(st.sampled_from(("id", "text", "image", "answer", "auto_map", "model_type", "reason", "")))] = draw(
                    odd
                )
    return value


@st.composite
def data_file(draw, rows, whole=False):
    """The bytes of a data file with these rows: mutated, in some layout, perhaps damaged. whole: one value, not rows."""
    rows = [draw(mutated(row)) for row in rows]
    if draw(st.integers(0, 9)) == 0:
        rows.insert(draw(st.integers(0, len(rows))), draw(odd))
    if draw(st.integers(0, 9)) == 0:
        rows += rows
    ascii_ = draw(st.booleans())
    layout = "whole" if whole else draw(st.sampled_from(("lines", "lines", "list", "pretty", "one")))
    if layout == "whole":
        text = json.dumps(rows[0] if rows else None, ensure_ascii=ascii_)
    elif layout == "list":
        text = json.dumps(rows, ensure_ascii=ascii_)
    else:
        texts = [json.dumps(row, ensure_ascii=ascii_, indent=2 if layout == "pretty" else None) for row in rows]
        text = (" " if layout == "one" else "\n").join(texts) + draw(st.sampled_from(("\n", "", "\r\n", "\n\n")))
    return draw(damaged(text.encode("utf-8", "surrogatepass")))


@st.composite
def damaged(draw, data):
    """The bytes as they are, mostly; else cut, wrongly encoded, with something before, between or behind."""
    match draw(st.sampled_from(("", "", "", "", "cut", "bom", "latin", "utf16", "zero", "twice", "insert", "empty", "deep"))):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "bom":
            return b"\xef\xbb\xbf" + data
        case "latin":
            return data.replace(b"a", "é".encode("latin-1"))
        case "utf16":
            return data.decode("utf-8", "replace").encode("utf-16")
        case "zero":
            return data.replace(b" ", b"\0", 1)
        case "twice":
            return data + data
        case "insert":
            place = draw(st.integers(0, len(data)))
            return (
                data[:place]
                + draw(st.sampled_from((b",", b"]", b"}", b'"', b"\n", b"NaN", b"\xff", b"\x1b[31m", b"1e999")))
                + data[place:]
            )
        case "empty":
            return draw(st.sampled_from((b"", b"\n", b"{}", b"[]", b"null", b"[{}]", b"\n\n\n")))
        case "deep":
            return draw(st.sampled_from((b"[", b'{"a":'))) * 5000 + data
    return data


def _png():
    stream = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(stream, "PNG")
    return stream.getvalue()


IMAGE = _png()
_QUESTIONS = [{"question_id": n, "image": "i.png", "text": text} for n, text in enumerate(("What is it?", "Is there a mass?"))]
_ANSWERS = [
    {
        "question_id": n,
        "text": text,
        "answer_id": "a",
        "model_id": "m",
        "seconds": 1.5,
        "forwards": 4,
        "tokens": 9,
        "asked_words": 4,
    }
    for n, text in enumerate(("yes it is", "a mass on the left"))
]
_RAD = [
    {
        "qid": 1,
        "image_name": "i.png",
        "question": "Is it?",
        "answer": "Yes",
        "answer_type": "CLOSED",
        "phrase_type": "freeform",
    },
    {
        "qid": 2,
        "image_name": "i.png",
        "question": "Where?",
        "answer": "left lung",
        "answer_type": "OPEN",
        "phrase_type": "para",
    },
]
_LLAVA = [
    {
        "id": "1",
        "image": "i.png",
        "answer_type": "CLOSED",
        "conversations": [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": "Yes"}],
    },
    {
        "id": "2",
        "image": "i.png",
        "answer_type": "OPEN",
        "conversations": [{"from": "human", "value": "Where?\n<image>"}, {"from": "gpt", "value": "left"}],
    },
]
_SLAKE = [
    {
        "qid": n,
        "img_name": "i.png",
        "q_lang": "en",
        "question": "Is it?",
        "answer": answer,
        "answer_type": kind,
        "modality": "CT",
        "location": "Lung",
        "content_type": "Organ",
        "base_type": "vqa",
        "triple": [],
    }
    for n, (answer, kind) in enumerate((("Yes", "CLOSED"), ("Lung", "OPEN")))
]
_PATH = [{"image": "i", "question": "Is it?", "answer": "yes"}, {"image": "i", "question": "where?", "answer": "skin"}]
_ASKED = [
    {
        **{"question_id": n, "image": "i.png", "text": f"q{n}\n<image>", "gpt4_answer": "yes", "type": "conversation"},
        **{"fig_label": "Fig. 1", "fig_caption": "A lung.", "in_text_mention": [{"tokens": "a"}]},
        "domain": {"chest_xray": True, "mri": False, "histology": False, "gross": False, "ct_scan": False},
    }
    for n in range(2)
]
_JUDGED = [{**row, "result": result} for row, result in zip(_ASKED, ("8 7\nwhy", "9 9"), strict=True)]
_SETS = {
    "vqa_rad": ("trainset.json", _RAD),
    "slake": ("train.json", _SLAKE),
    "pathvqa": ("train.jsonl", _PATH),
    "llava_med_vqa": ("train.json", _LLAVA),
    "llava_med_instruct": ("instruct.json", _LLAVA),
    "llava_med_align": ("align.json", _LLAVA),
    "qa50": ("llava_med_eval_qa50_qa.jsonl", _ASKED),
}


def case(files, *line, **more):
    return {"files": {"i.png": IMAGE, **files}, "line": line, **more}


def questions():
    """Question files of `medv generate`."""
    line = (
        "generate",
        "--questions",
        "{folder}/q",
        "--images",
        "{folder}",
        "--out",
        "{folder}/out",
        "--model",
        str(TINY),
        *SHORT,
    )
    return st.builds(lambda q: case({"q": q}, *line), data_file(_QUESTIONS))


@st.composite
def checkpoint(draw):
    """Model folders of `medv ask`: one of the files in JSON is mutated."""
    names = sorted(path.name for path in TINY.glob("*.json") if path.name != "tokenizer.json")
    name = draw(st.sampled_from((*names, "config.json", "config.json")))
    data = draw(data_file([json.loads((TINY / name).read_text(encoding="utf-8"))], whole=True))
    files = {f"m/{path.name}": path for path in TINY.iterdir()} | {f"m/{name}": data}
    return case(files, "ask", "{folder}/i.png", "What is it?", "--model", "{folder}/m", *SHORT)


@st.composite
def vqa(draw):
    """References and predictions of `medv evaluate vqa`."""
    rows = draw(st.sampled_from((_RAD, _LLAVA, _SLAKE)))
    key = "id" if rows is _LLAVA else "qid"
    told = [{"question_id": row[key], "text": text} for row, text in zip(rows, ("yes", "left lung"), strict=True)]
    files = {"r.json": draw(data_file(rows)), "p.jsonl": draw(data_file(told))}
    variant = draw(st.sampled_from(("batch", "gated")))
    return case(
        files,
        "evaluate",
        "vqa",
        "--references",
        "{folder}/r.json",
        "--predictions",
        "{folder}/p.jsonl",
        "--variant",
        variant,
        *draw(_json),
    )


_json = st.sampled_from(((), ("--json",)))


def text():
    """Answer files of `medv evaluate text`."""
    line = ("evaluate", "text", "--answers", "{folder}/a")
    return st.builds(
        lambda a, more: case({"a": a}, *line, *more), data_file(_ANSWERS), st.sampled_from(((), ("--marked",), ("--json",)))
    )


def judgements():
    """Judgement files of `medv evaluate judge`."""
    line = ("evaluate", "judge", "--judgements", "{folder}/j")
    return st.builds(lambda j, more: case({"j": j}, *line, *more), data_file(_JUDGED), _json)


_JUDGE = (
    *("judge", "--questions", "{folder}/q", "--answers", "{folder}/a", "--out", "{folder}/out", "--base-url", "{url}"),
    *("--attempts", "1", "--timeout", "5"),
)


@st.composite
def judged(draw):
    """Questions and answers of `medv judge`, perhaps with something at `--out`."""
    line = (
        *_JUDGE[:6],
        draw(st.sampled_from(("{folder}/out", "{folder}/out", "{folder}/q", "{folder}/a", "{folder}/x"))),
        *_JUDGE[7:],
    )
    files = {"q": draw(data_file(_ASKED)), "a": draw(data_file(_ANSWERS)), "x": draw(data_file(_JUDGED))}
    return case(files, *line, *draw(_json))


_REPLY = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "8 7\nwhy"}, "finish_reason": "stop"}],
}
_REPLIES = (
    _REPLY,
    {"error": {"message": "slow down", "type": "requests", "param": None, "code": 429}},
    {"choices": [{"message": {"content": [{"type": "text", "text": "8 7"}], "refusal": None, "reasoning_content": "hm"}}]},
    {"object": "error", "message": "no", "code": 404},
    {"detail": [{"loc": ["body"], "msg": "temperature"}]},
)


@st.composite
def replies(draw):
    """What an endpoint sends to `medv judge`: any status, headers and body."""
    lines = "\n".join(json.dumps(row) for row in _ASKED).encode()
    files = {"q": lines, "a": "\n".join(json.dumps(row) for row in _ANSWERS).encode()}
    body = draw(data_file([draw(st.sampled_from(_REPLIES))], whole=True)).decode("latin-1")
    waits = (
        "0",
        "1e9",
        "-1",
        "nan",
        "soon",
        "Wed, 21 Oct 20150000000000 07:28:00 GMT",
        "Wed, 21 Oct 2015 07:28:00 -9999",
        "9" * 400,
    )
    headers = draw(st.dictionaries(st.just("Retry-After"), st.sampled_from(waits)))
    headers |= draw(st.dictionaries(st.just("Content-Encoding"), st.sampled_from(("gzip", "identity", "br")), max_size=1))
    headers |= draw(
        st.dictionaries(
            st.just("Content-Type"), st.sampled_from(("application/json", "text/html; charset=utf-7", "x")), max_size=1
        )
    )
    headers |= draw(
        st.dictionaries(
            st.just("Location"), st.sampled_from(("http://127.0.0.1:1/", "file:///etc/hostname", "//", "")), max_size=1
        )
    )
    status = draw(
        st.sampled_from((200, 200, 200, 200, 204, 206, 301, 302, 307, 304, 400, 401, 403, 404, 418, 422, 429, 500, 503, 599))
    )
    return case(files, *_JUDGE, *draw(_json), reply=(status, headers, body))


@st.composite
def data(draw):
    """Annotation files of `medv data check`."""
    name = draw(st.sampled_from(sorted(_SETS)))
    file, rows = _SETS[name]
    return case(
        {f"d/{file}": draw(data_file(rows)), "d/images/i.png": IMAGE}, "data", "check", name, "{folder}/d", *draw(_json)
    )
