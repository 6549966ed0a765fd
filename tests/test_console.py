"""What the command line prints: text that cannot steer a terminal, a sentence for what a person can mend, a bug as a bug."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest
import typer
from command import run
from safetensors import SafetensorError
from torch import OutOfMemoryError
from typer.testing import CliRunner

from medv.commands import console
from medv.commands.console import BUG, plain_console, print_mapping, report_errors

HOSTILE = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e[red]b[/red] :smile:\ud800"


def raising(error):
    small = typer.Typer()

    @small.command()
    @report_errors
    def fail():
        raise error

    return CliRunner().invoke(small, [])


def os_error(code, path="a/b"):
    return OSError(code, os.strerror(code), path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (os_error(errno.ENOSPC), "a/b cannot be written, because the disk is full: make room"),
        (os_error(errno.EROFS), "a/b is on a read-only disk"),
        (os_error(errno.ENAMETOOLONG), "a/b has too long a name"),
        (os_error(errno.EISDIR), "a/b is a folder"),
        (os_error(errno.ENOTDIR), "a part of its path is a file"),
        (os_error(errno.EACCES), "change its permissions"),
        (os_error(errno.ENOENT), "a/b does not exist"),
        (os_error(errno.EIO), "a/b cannot be used: Input/output error"),
        (OSError("the folder holds no weights\nsee the manual"), "the folder holds no weights see the manual"),
        (ValueError("a\nb"), "a b"),
        (SafetensorError("header too large"), "header too large"),
        (MemoryError(), "not enough memory"),
        (OutOfMemoryError("CUDA"), "not enough memory"),
        (ValueError(HOSTILE), "\\x1b]0;owned\\x07"),
        (FileNotFoundError(2, "x", "\x1b[31m\nmedv: all is well"), "\\x1b[31m medv: all is well does not exist"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_person_can_mend_is_one_sentence_and_exit_code_2(error, words):
    done = raising(error)
    assert done.exit_code == 2 and words in done.stderr
    assert done.stderr.startswith("medv: ") and done.stderr.count("\n") == 1 and not done.stdout
    assert "\x1b" not in done.stderr


def test_a_character_that_cannot_be_written_is_named():
    with pytest.raises(UnicodeEncodeError) as caught:
        "a\udce4".encode()
    done = raising(caught.value)
    assert done.exit_code == 2 and "\\udce4" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [KeyError("x\x1b"), ZeroDivisionError(), RecursionError(), TypeError("t"), RuntimeError()])
def test_a_bug_is_a_traceback_and_says_that_it_is_one(error):
    done = raising(error)
    assert done.exit_code == 1 and "Traceback" in done.stderr and done.stderr.endswith(f"medv: {BUG}\n")
    assert "\x1b" not in done.stderr and not done.stdout


@pytest.mark.parametrize("kind", [typer.Exit, typer.Abort])
def test_a_command_may_end_by_itself(kind):
    done = raising(kind())
    assert done.exit_code in (0, 1) and "bug" not in done.stderr


def test_nothing_that_is_printed_steers_the_terminal_or_is_read_as_markup():
    stream = io.StringIO()
    printer = plain_console(file=stream, force_terminal=True, width=200)
    printer.print(HOSTILE)
    printer.print(f"first\nsecond {HOSTILE}", style="red")
    said = stream.getvalue()
    assert "[red]b[/red] :smile:" in said and "\\x1b]0;owned" in said and "\\x9b2J\\u202e" in said and "\\ud800" in said
    assert "first" in said.splitlines()[1]
    assert not set(said) & {"\x07", "\x9b", "\u202e", "\ud800"} and "\x1b]" not in said


def test_tables_and_json_show_escapes_too(capsys):
    print_mapping(HOSTILE, {HOSTILE: HOSTILE}, as_json=False)
    print_mapping("", {HOSTILE: "ä"}, as_json=True)
    said = capsys.readouterr().out
    assert not set(said) & set("\x1b\x07\x9b\u202e\ud800")
    assert json.loads(said.splitlines()[-1]) == {HOSTILE: "ä"}


def answers(path, text):
    path.write_text(json.dumps({"question_id": 1, "text": text}) + "\n")
    return path


def test_answers_ids_and_names_from_files_are_shown_and_not_obeyed(tmp_path):
    hostile = HOSTILE.replace("\ud800", "")
    path = answers(tmp_path / "a\x1b[31m\n.jsonl", hostile)
    judged = tmp_path / "j.jsonl"
    judged.write_text(json.dumps({"question_id": hostile + "\nunjudged 7", "result": hostile}) + "\n")
    rad = {"qid": hostile, "image_name": hostile, "question": "?", "answer": "", "phrase_type": "freeform"}
    (tmp_path / "testset.json").write_text(json.dumps([rad | {"answer_type": "OPEN"}]))
    (tmp_path / "images").mkdir()
    outputs = [
        run("evaluate", "text", "--answers", path, "--marked"),
        run("evaluate", "judge", "--judgements", judged),
        run("data", "check", "vqa_rad", tmp_path),
        run("evaluate", "text", "--answers", tmp_path / "gone\x1b[31m\n.jsonl"),
        run("evaluate", "vqa", "--references", path, "--predictions", path),
    ]
    for done in outputs:
        assert not set(done.stdout + done.stderr) & set("\x1b\x07\x9b\u202e"), done.args
        assert "\\x1b" in done.stdout + done.stderr
    assert "\nunjudged 7" not in outputs[1].stdout


def shell(command, **environment):
    """The command in a process of its own; `medv` is this source tree's."""
    command = command.replace("medv ", f"{sys.executable} -m medv ")
    return subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | environment, timeout=300)


@pytest.mark.slow
def test_a_full_a_closed_and_a_narrow_output_are_no_tracebacks(tmp_path):
    path = answers(tmp_path / "a.jsonl", "→ ä \u202e lung " * 2000)
    text = f"medv evaluate text --answers {path} --marked"
    full = shell(f"{text} > /dev/full")
    assert full.returncode == 2 and b"disk is full" in full.stderr
    json_full = shell(f"{text} --json > /dev/full")
    assert json_full.returncode == 2 and json_full.stderr.count(b"\n") == 1
    gone = shell(f"set -o pipefail; {text} | head -c 1")
    assert gone.returncode in (0, 1) and gone.stderr == b""
    closed = shell(f"{text} >&-")
    assert closed.returncode == 0 and closed.stderr == b""
    narrow = shell(text, PYTHONIOENCODING="ascii")
    assert narrow.returncode == 0 and rb"\u2192" in narrow.stdout


@pytest.mark.parametrize("name", ["console", "errors"])
def test_the_commands_print_through_consoles_that_show_escapes(name):
    assert getattr(console, name)._render_hooks
