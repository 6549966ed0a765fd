"""Hostile and odd files: refused at once, in one sentence with file and line; good ones are read whatever their form."""

import errno
import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from medv import reading
from medv.artifacts import append_jsonl, read_jsonl, write_text
from medv.data.images import ImageError, ImageFolder, open_image, resolve_image
from medv.data.readers import read_dataset
from medv.data.rows import by_id, read_rows
from medv.evaluation.benchmark import read_questions
from medv.evaluation.judge import read_judgements
from medv.evaluation.pairing import read_predictions
from medv.evaluation.text import read_answers
from medv.reading import DataError, open_regular, parse_json, read_json, read_text, visible

GOOD = {"question_id": 1, "image": "a.png", "text": "What is shown?"}


@pytest.fixture
def no_file(tmp_path, monkeypatch, request):
    """Something at a path that is no regular file of a sensible size."""
    path = tmp_path / "odd"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket has at most 108 bytes
        socket.socket(socket.AF_UNIX).bind("odd")
    elif request.param == "link to a device":
        path.symlink_to("/dev/zero")
    elif request.param == "2 GiB":
        with path.open("wb") as stream:
            stream.truncate(2 << 30)
    elif request.param == "loop":
        path.symlink_to("odd")
    elif request.param == "long name":
        return tmp_path / ("x" * 300)
    elif request.param == "zero byte":
        return tmp_path / "a\0b"
    else:
        return Path(request.param)
    return path


def refusal(read, path):
    """What `read` says of `path`, in a process of its own: a read that waits for ever is ended after a minute."""
    context = multiprocessing.get_context("fork")
    answer, end = context.Pipe(duplex=False)

    def tell():
        with pytest.raises((DataError, ImageError)) as caught:
            read(path)
        end.send(str(caught.value))

    child = context.Process(target=tell)
    child.start()
    end.close()
    try:
        assert answer.poll(60), f"{read.__name__} hangs on {path}"
        return answer.recv()
    finally:
        child.kill()
        child.join()


ODD = ["pipe", "folder", "socket", "link to a device", "/dev/zero", "2 GiB", "loop", "long name", "zero byte"]


@pytest.mark.parametrize("no_file", [*ODD, "/dev/tty", "/nonexistent/a"], indirect=True)
@pytest.mark.parametrize(
    "read", [read_text, read_rows, read_predictions, read_answers, read_judgements, open_image], ids=lambda read: read.__name__
)
def test_what_is_no_file_is_refused_at_once_and_in_a_sentence(no_file, read):
    said = refusal(read, no_file)
    assert "\n" not in said and "Errno" not in said


@pytest.mark.parametrize("no_file", ["pipe", "folder", "socket", "link to a device"], indirect=True)
def test_nothing_is_written_over_what_is_no_file(no_file):
    kind = no_file.stat().st_mode
    for write in (lambda: write_text(no_file, "x"), lambda: append_jsonl(no_file, {"a": 1})):
        with pytest.raises(DataError, match="give a regular file"):
            write()
    assert no_file.stat().st_mode == kind


def test_a_file_that_becomes_a_pipe_after_the_look_is_still_refused(tmp_path, monkeypatch):
    path, pipe = tmp_path / "a", tmp_path / "pipe"
    path.write_text("x")
    os.mkfifo(pipe)
    real = os.open
    monkeypatch.setattr(reading.os, "open", lambda name, flags: real(pipe, flags))
    with pytest.raises(DataError, match="is a pipe"), open_regular(path):
        pass


BAD_JSON = {
    b"": "no rows",
    b" \n\n": "no rows",
    b"\xef\xbb\xbf": "no rows",
    b"[]": "no rows",
    b"5": "line 1: expected an object with named fields, found 5",
    b'"x"': "line 1: expected an object",
    b"null": "found null",
    b"[1, 2]": "row 1: expected an object",
    b'[{"a": 1}, [2]]': "row 2: expected an object",
    b'{"a": 1}\n\n{"a": NaN}': "line 3: .*NaN",
    b'{"a": -Infinity}': "line 1: .*Infinity",
    b'{"a": 1}\n{"a": 1, "a": 2}': "line 2: .*'a' stands there twice",
    b'{"b": {"a": 1, "a": 1}}': "twice",
    b'{"a": 1}\n{"a": "\\ud800 b"}': r"line 2: \\ud800 is half of a character",
    b'{"\\udfff": 1}': "half of a character",
    b'{"a": "\xe4"}': "line 1: not UTF-8",
    b'{"a": 1}\n{"a": "\xe4"}': "line 2: not UTF-8",
    b'\xff\xfe{\0"\0': "not UTF-8",
    b"[" * 100_000: "line 1: nested too deeply",
    b'{"a": 1}\n' + b'{"a":' * 70 + b"1" + b"}" * 70: "line 2: nested too deeply",
    b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}": "nested too deeply",
    b'{"a": ' + b"9" * 5000 + b"}": "line 1: ",
    b'{"a": 1}\n{"a": ': "line 2: not JSON",
    b'{"a": 1}\n{"a": 1': "line 2: not JSON",
    b'[{"a": 1}\n{"a": 2}]': "line 2: not JSON",
    b'[{"a": 1},\n]': "line 2: not JSON",
    b'[{"a": 1}] [{"a": 2}]': "something follows the list",
    b"\0\0\0": "line 1: not JSON",
    b"{'a': 1}": "not JSON",
    b'{"a": ' + b"9" * 400 + b"}": "too large",
}


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: repr(content[:24]))
def test_what_is_no_json_as_it_should_be_is_refused_with_file_and_line(tmp_path, content):
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=BAD_JSON[content]) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \t\r\n"])
@pytest.mark.parametrize("form", ["lines", "list", "pretty"])
def test_byte_order_marks_line_ends_and_layouts_make_no_difference(tmp_path, begin, end, form):
    rows = [{"a": "ä \u2028 \U0001f9e0", "b": [[1]]}, {"a": ""}]
    text = {
        "lines": end.join(map(json.dumps, rows)) + end,
        "list": json.dumps(rows).replace(", {", f", {end}{{") + end,
        "pretty": end.join(json.dumps(row, indent=1).replace("\n", end) for row in rows),
    }[form]
    path = tmp_path / "q.jsonl"
    path.write_bytes(begin + text.encode())
    assert read_rows(path) == rows


def test_values_and_texts_are_read_alone_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf\n{"a": [1.5, null]} \n')
    assert read_json(path) == parse_json('{"a": [1.5, null]}', "x") == {"a": [1.5, None]}
    for text in ("", "{} {}", "[1,]", "NaN"):
        with pytest.raises(DataError, match="the reply line 1: not JSON"):
            parse_json(text, "the reply")


def test_a_torn_last_line_never_costs_another_line(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question_id": 1, "result": "8 7"}\n{"question_id": 2, "result": "')
    assert read_jsonl(path) == [{"question_id": 1, "result": "8 7"}]
    scores = read_judgements(path)
    assert [item.id for item in scores.judged] == ["1"] and [name for name, _ in scores.unjudged] == ["line 2"]
    path.write_bytes(b'{"a": 1}\n{"b"\n{"a": 2}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_jsonl(path)
    path.write_bytes(b'{"question_id": 1, "result": "8 7"}\n{"question_id": 2, "result": "9 \xe4"}\n')
    assert len(read_judgements(path).judged) == 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("text", None, "'text' is null"),
        ("text", 5, "'text' is 5"),
        ("text", ["What?"], "'text' is \\['What"),
        ("text", {"a": 1}, "'text' is {"),
        ("text", True, "'text' is true"),
        ("text", "", "'text' is empty"),
        ("text", " \n", "'text' is empty"),
        ("text", "<image>\n", "no question beside <image>"),
        ("image", None, "'image' is null"),
        ("image", 5, "'image' is 5"),
        ("image", ["a.png"], "'image' is \\["),
        ("image", "", "'image' is empty"),
        ("image", "../a.png", "leads out of the image folder"),
        ("image", "a\0.png", "is not an image name"),
        ("question_id", None, "'question_id' is null"),
        ("question_id", True, "'question_id' is true"),
        ("question_id", 1.5, "'question_id' is 1.5"),
        ("question_id", 1e400, "Infinity|'question_id' is inf"),
        ("question_id", [1], "'question_id' is \\["),
        ("question_id", " ", "'question_id' is ' '"),
    ],
)
def test_a_question_without_a_sound_id_text_or_image_is_refused_with_its_line(tmp_path, field, value, words):
    path = tmp_path / "q.jsonl"
    row = json.dumps({**GOOD, field: value}).replace("Infinity", "1e400")
    path.write_text(json.dumps({**GOOD, "question_id": "first"}) + "\n\n" + row)
    with pytest.raises(DataError, match=f"line 3: .*{words}"):
        read_questions(path, tmp_path)


@pytest.mark.parametrize("missing", ["text", "image"])
def test_a_field_that_is_not_there_is_named(tmp_path, missing):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({key: value for key, value in GOOD.items() if key != missing}))
    with pytest.raises(DataError, match=f"line 1: no '{missing}'"):
        read_questions(path, tmp_path)


@pytest.mark.parametrize("ids", [(1, "1"), (1, 1.0), ("a", " a"), (None, 0)])
def test_ids_that_are_one_are_refused(tmp_path, ids):
    path = tmp_path / "q.jsonl"
    rows = [{**GOOD, "question_id": name} for name in ids]
    path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows))
    with pytest.raises(DataError, match=r"line 2: the id .* stands in line 1 already"):
        by_id(read_rows(path), "question_id")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a b", "seconds": "1.2"}, "'seconds' is '1.2'"),
        ({"text": "a b", "tokens": "2", "gen_length": 64}, "'tokens' is '2'"),
        ({"text": "a b", "tokens": 2, "settings": {"gen_length": "64"}}, "'gen_length' is '64'"),
        ({"text": "a b", "forwards": [1]}, "'forwards' is"),
        ({"text": "a b", "forwards": -1}, "'forwards' is -1"),
        ({"text": "a b", "seconds": True}, "'seconds' is true"),
        ({"text": 2}, "'text' is 2"),
        ({"answer": None}, "'answer' is null"),
        ({"question_id": 1}, "no 'text' or 'answer'"),
    ],
)
def test_an_answer_without_text_or_with_amounts_that_are_none_is_refused(tmp_path, row, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine", "seconds": 1, "tokens": None}) + "\n" + json.dumps(row))
    with pytest.raises(DataError, match=f"line 2: .*{words}"):
        read_answers(path)


@pytest.mark.parametrize("image", ["null", "NaN", "3", '["a.jpg"]', '""'])
def test_a_dialogue_whose_image_is_no_name_is_refused_for_that_reason(tmp_path, image):
    row = '{"id": "1", "image": %s, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A."}]}'
    (tmp_path / "x_instruct.json").write_text(f"[{row % image}]")
    with pytest.raises(DataError, match=r"'image' is|NaN is no value"):
        read_dataset("llava_med_instruct", tmp_path)


def test_links_leave_the_image_folder_only_into_named_roots(tmp_path):
    images, store, other = (tmp_path / name for name in ("images", "store", "other"))
    for folder in (images, store, other):
        folder.mkdir()
        Image.new("L", (4, 4)).save(folder / "blob", "PNG")
    (images / "a.png").symlink_to(store / "blob")
    (images / "b.png").symlink_to("../other/blob")
    (images / "chain.png").symlink_to(images / "a.png")
    with pytest.raises(ImageError, match="--image-root"):
        resolve_image(images, "a.png")
    allowed = ImageFolder(images, (store,))
    assert open_image(resolve_image(allowed, "a.png")).size == open_image(resolve_image(allowed, "chain.png")).size
    with pytest.raises(ImageError, match="--image-root"):
        resolve_image(allowed, "b.png")
    for name in ("../store/blob", str(store / "blob")):
        with pytest.raises(ImageError, match="must be relative"):
            resolve_image(allowed, name)
    with pytest.raises(ImageError, match="is not a folder"):
        ImageFolder(images, (tmp_path / "nowhere",))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 中 🧠", "plain ä 中 🧠"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b31m", "\\x9b31m"),
        ("abc\u202egnp.exe", "abc\\u202egnp.exe"),
        ("\u2066x\u2069\u200b\ufeff", "\\u2066x\\u2069\\u200b\\ufeff"),
        ("\udce4.png", "\\udce4.png"),
        ("a\u2028b\x7f", "a\\u2028b\\x7f"),
        ("a\u00a0b", "a\u00a0b"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text, shown):
    assert visible(text) == shown


def test_errors_of_the_system_become_sentences_with_the_path():
    for code in (errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EIO):
        said = reading.in_a_sentence(OSError(code, os.strerror(code), "a/b"))
        assert said.startswith("a/b ") and "Errno" not in said
