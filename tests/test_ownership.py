"""One guard and one lock for everything that takes --out: what is not ours to continue is refused, and stays as it was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medv.artifacts import append_jsonl
from medv.ownership import LOCK, check_apart, check_new, claim_file, claim_folder, hold, owned, owned_rows

RUN = {"made_by": "medv train", "seed": 0, "recipe": {"epochs": 2}, "data": "a" * 64}
HOLDER = """
import sys, time
from pathlib import Path
from medv.ownership import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def tree(folder: Path) -> dict:
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(folder: Path, match: str, claim) -> None:
    """The claim is refused in words, and nothing under `folder` is touched."""
    before = tree(folder)
    with pytest.raises((ValueError, FileExistsError), match=match), claim:
        pass
    assert tree(folder) == before


def test_a_folder_is_claimed_new_empty_or_again_by_the_same_run(tmp_path):
    out = tmp_path / "deep" / "out"
    for _ in range(2):
        with claim_folder(out, RUN):
            assert json.loads((out / "run.json").read_text()) == RUN
        (out / "weights").write_text("w")
    (tmp_path / "empty").mkdir()
    with claim_folder(tmp_path / "empty", RUN):
        pass
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 9}, "seed 0, now 9"),
        ({"recipe": {"epochs": 3}}, "recipe.epochs 2, now 3"),
        ({"data": "b" * 64}, "data changed"),
        ({"lora": {"rank": 4}}, "lora changed"),
        ({"made_by": "medv generate"}, "not made by this version's medv generate"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_what_differs(tmp_path, change, said):
    with claim_folder(tmp_path / "out", RUN):
        pass
    refused(tmp_path, said, claim_folder(tmp_path / "out", RUN | change))


def test_what_is_not_ours_to_continue_is_refused_and_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text('{"recipe": {}, "seed": 0, "lora": null, "examples": 10}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("[1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".git").mkdir()
    refused(tmp_path, "not a folder", claim_folder(tmp_path / "notes.txt", RUN))
    refused(tmp_path, "not made by this version", claim_folder(tmp_path / "old", RUN))
    refused(tmp_path, "not made by this version", claim_folder(tmp_path / "broken", RUN))
    refused(tmp_path, "holds other files", claim_folder(tmp_path / "model", RUN))
    refused(tmp_path, "holds other files", claim_folder(tmp_path / "link", RUN))
    refused(tmp_path, "holds other files", claim_folder(tmp_path / "hidden", RUN))
    refused(tmp_path, "holds other files", claim_folder(tmp_path, RUN))


def test_an_output_in_around_or_linked_to_an_input_is_refused(tmp_path):
    model, file = tmp_path / "model", tmp_path / "q.jsonl"
    model.mkdir()
    file.write_text("{}\n")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "hard").hardlink_to(file)
    for out, given in (
        (model, model),
        (model / "out", model),
        (tmp_path, model),
        (tmp_path / "link", model),
        (tmp_path / "link" / "out", model),
        (file, file),
        (tmp_path / "hard", file),
    ):
        with pytest.raises(ValueError, match=r"also an input|lie in each other"):
            check_apart(out, [given])
    check_apart(tmp_path / "model2", [model, None, tmp_path / "absent"])


def test_rows_of_the_same_run_are_given_back_without_a_torn_one(tmp_path):
    out = tmp_path / "answers.jsonl"
    with claim_file(out, RUN) as rows:
        assert rows == []
        for n in (1, 2):
            append_jsonl(out, owned(RUN, {"n": n}))
    with out.open("a") as stream:
        stream.write(json.dumps(owned(RUN, {"n": 3}))[:40])
    with claim_file(out, RUN) as rows:
        assert [row["n"] for row in rows] == [1, 2]
        append_jsonl(out, owned(RUN, {"n": 4}))
    assert [row["n"] for row in owned_rows(out, RUN)] == [1, 2, 4]
    assert list(tmp_path.iterdir()) == [out]
    refused(tmp_path, "seed 0, now 1", claim_file(out, RUN | {"seed": 1}))


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        b"\n",
        b'{"question_id": "1", "text": "a"}',
        b'{"question_id": "1", "text": "a"}\n',
        b'{"run": "0123456789"}\n',
        b'{"run": {"made_by": "medv judge"}}\n',
        b'[1]\n"a"\n',
        b"[" * 100_000 + b"\n",
        b"\x89PNG\r\n\x1a\n\x00",
        b"\xff\xfe",
    ],
)
def test_a_file_with_any_other_content_is_refused_and_stays(tmp_path, content):
    out = tmp_path / "out"
    out.write_bytes(content)
    refused(tmp_path, "was not made by", claim_file(out, RUN))


def test_a_file_is_no_folder_pipe_input_or_link_to_something_else(tmp_path):
    given, run = tmp_path / "q.jsonl", RUN
    given.write_text(json.dumps(owned(run, {})) + "\n")
    (tmp_path / "hard").hardlink_to(given)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match="is not a file"), claim_file(tmp_path / name, run):
            pass
    for name in ("q.jsonl", "hard"):
        with pytest.raises(ValueError, match="is also an input"), claim_file(tmp_path / name, run, inputs=[given]):
            pass
    with claim_file(tmp_path / "new", run, inputs=[tmp_path]):  # beside the images of its own folder
        pass


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_second_process_is_refused_at_once_and_a_killed_one_does_not_block(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    claim = claim_folder if kind == "folder" else claim_file
    with pytest.raises(ValueError, match=rf"another process \({process.pid}\) is working on"), claim(out, RUN):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claim(out, RUN), hold(out):  # again, by the one who has it
        process = subprocess.run([sys.executable, "-c", HOLDER, str(out)], capture_output=True, text=True)
        assert f"another process ({os.getpid()}) is working on" in process.stderr
    assert not list(tmp_path.rglob(f"*{LOCK}"))


def test_nothing_that_exists_is_new(tmp_path):
    check_new(tmp_path / "new")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "dangling"):
        with pytest.raises(FileExistsError, match="would be overwritten"):
            check_new(path)
    with pytest.raises(ValueError, match="lie in each other"):
        check_new(tmp_path / "new", [tmp_path])
