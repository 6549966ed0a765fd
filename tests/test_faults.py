"""Every fault of the page "Faults found by use", tried again as the page gives it: the command line, its inputs, small models.

A test's id has the page's number. What another test tries already, with the same input by the same road, stands here (`a: b` is
`tests/test_a.py::test_b`):

| fault | tried by |
|---|---|
| A1 | continuing: another_training_into_a_finished_folder_is_refused |
| A2 | continuing: models_and_files_of_others_are_not_trained_over |
| A5 generate | continuing: answers_go_to_no_file_that_is_not_theirs |
| A6 | continuing: answers_go_on_only_with_the_same_model_questions_and_images |
| A8 each set | training_set: every_set_without_its_pictures_is_refused |
| A10 | dicom: palettes_of_both_depths_give_the_same_picture |
| A11 | dicom: the_voi_table_of_a_header_is_applied |
| A14 a long question | cli: one_question_of_a_hundred_thousand_characters_is_refused_by_its_id |
| A15 sixteen bits | processing: a_picture_in_memory_is_seen_as_open_image_sees_its_file |
| A15 array, path | processing: what_is_no_picture_is_refused_and_told_what_is |
| A17 epochs, warmup of a recipe | continuing: a_recipe_has_no_number_without_a_meaning |
| A17, D papermill's -p | continuing: a_notebook_refuses_parameters_of_another_kind |
| B1 | judging: the_command_of_the_readme_prints_its_table |
| B2 temperature | judging: a_judge_that_refuses_a_temperature_judges_without_and_the_table_says_so |
| B2 dialects | judging: each_dialect_of_a_judge_is_read |
| B2 refusals, retries | judging: what_asking_again_cannot_mend_is_asked_once_and_listed_with_the_raw_text |
| B2 quota | judging: a_quota_that_is_used_up_is_one_sentence_and_the_rest_is_not_asked |
| B3 endpoints | judging: each_kind_of_trouble_that_stays_is_listed_with_its_reason |
| B3 Ctrl-C | judging: an_interrupted_run_ends_soon_and_keeps_what_is_finished |
| B4 socks5 | judging: proxies_that_cannot_be_used_are_one_sentence |
| B4 IPv6 | judging: a_network_without_proxy_is_no_trouble |
| B5 generate | cli: images_may_be_links_into_a_named_root |
| B6 | cli: images_that_cannot_be_read_stop_a_benchmark_or_are_left_out_counted_and_listed |
| C1 `yes` to ask | loading: code_of_a_model_never_runs_whatever_is_typed |
| C1 towers, bases | loading: code_of_what_lies_below_never_runs |
| C2, D --out a pipe, a folder | cli: answers_are_not_written_over_what_is_no_file |
| C2 deflated DICOM | dicom: a_deflated_file_is_refused_before_it_is_inflated |
| C4 data check, evaluate | console: answers_ids_and_names_from_files_are_shown_and_not_obeyed |
| C5 availability | loading: availability_looks_at_the_disk_alone |
| C5 make lab | house: make_lab_asks_nobody_for_news_updates_or_extensions |
| D truncated, empty weights | loading: a_damaged_weight_file_is_one_sentence_at_the_command_line |
| D lone surrogate of a shell | cli: a_question_that_is_no_text_is_refused |
| D empty training set | continuing: a_training_set_without_examples_is_refused |
| D missing decoder | dicom: the_reason_and_the_mend_of_a_decoder_that_failed_are_told_whole |
| D lengths, generate | cli: a_canvas_longer_than_the_model_reads_is_refused_before_anything_is_written |
"""

import json
import os
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from damaged import as_type, change, edit, files, half, resized, spoiled, tree
from launched import start_command
from stub_judge import StubJudge
from typer.testing import CliRunner

from medv.checkpoints.bundled import bundled
from medv.cli import app

SHARED = Path(os.environ.get("MEDV_SHARED", Path(__file__).parents[1] / "../shared")).resolve()
INPUTS = SHARED / "faults/inputs"
LONGEST = 20
"""Seconds for one command; what the page calls a hang took minutes."""
SHORT = "--gen-length 8 --block-length 8 --steps 4"
ASK = f"ask i/a.png What? --model W {SHORT}"
GENERATE = f"generate --images i --model W --out out.jsonl {SHORT} --questions"
W, CONFIG = Path("W"), Path("W/config.json")
TRAIN = "train vqa --profile smoke --out out"
LONG = "x" * 300
SHOWN = '{"question_id": 1, "image": "a.png", "text": "What is shown?"}'
OK = '{"question_id": 1, "image": "ok.png", "text": "what?"}'
SAID = '"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A."}]'
ROWS = {
    "A13-q_text_null": (SHOWN.replace('"What is', 'null, "question": "What is') + "\n", "line 1: 'text' is null"),
    "A13-gen_text_none": (OK.replace('"what?"', "null"), "line 1: 'text' is null"),
    "D-gen_list": ("[1,2]\n", "row 1: expected an object"),
    "D-gen_str": ('"x"\n', "line 1: expected an object"),
    "D-gen_num": ("5\n", "line 1: expected an object"),
    "D-gen_img_int": (OK.replace('"ok.png"', "5") + "\n", "line 1: 'image' is 5"),
    "D-gen_deep": ("[" * 100_000 + "\n", "line 1: nested too deeply"),
    "D-gen_dup_types": (OK + "\n" + OK.replace("1", '"1"') + "\n", "line 2: the id '1' stands in line 1"),
    "D-q_image_list": (SHOWN.replace('"a.png"', '["a.png"]') + "\n", "line 1: 'image' is ['a.png']"),
    "D-q_latin1": (SHOWN.replace("shown", "gez\xe4hlt").encode("latin-1"), "line 1: not UTF-8"),
    "D-q_empty": ("", "has no rows"),
    "D-q_id_null": ((SHOWN.replace("1", "null", 1) + "\n") * 2, "line 1: 'question_id' is null"),
    "D-q_surrogate": ('{"question_id":1,"image":"a.png","text":"What \\ud800 is it?"}\n', r"line 1: \ud800 is half"),
}
"""Question files that are refused, and in which words."""
OWN = {f"{fault.partition('-')[2]}.jsonl": content for fault, (content, _) in ROWS.items()} | {
    "ids_pred_float.jsonl": '{"question_id": 2.0, "text": "no"}\n{"question_id": 1.0, "text": "yes"}\n',
    "ids_ref.json": '[{"qid": 1, "image_name": "a.png", "answer": "yes", "answer_type": "CLOSED", "question": "A?", '
    '"phrase_type": "freeform"}, {"qid": 2, "image_name": "a.png", "answer": "no", "answer_type": "CLOSED", "question": "B?", '
    '"phrase_type": "freeform"}]',
    "j5.jsonl": '\ufeff{"question_id": 1, "type": "conversation", "result": "8 7"}\n{"question_id": 2, "result": "',
    "llava_image_nan.json": f'[{{"id": "1", "image": NaN, {SAID}}}]',
    "llava_image_null.json": f'[{{"id": "1", "image": null, {SAID}}}]',
    "p_number.jsonl": '{"question_id": 1, "text": 2}\n{"question_id": 2, "text": "yes"}\n',
    "pv1.json": '[{"img_id": "test_0001", "sentf": {"pvqa": ["is it?", "how many?", "is that?"]}, '
    '"labelf": {"pvqa": [{"Yes": 1.0}, {"2": 1.0}, {"no ": 1.0}]}}]',
    "q_bom.jsonl": f"\ufeff{SHOWN}\n",
    "q_crlf.jsonl": f"{SHOWN}\r\n{SHOWN.replace('1', '2', 1)}\r\n\r\n",
    "q_list.json": f"[{SHOWN}]",
    "sl2.json": '[{"qid": 1, "img_name": "a", "q_lang": "EN", "question": "q", "answer": "a", "answer_type": "OPEN"}]',
    "t_sec.jsonl": '{"text": "a b", "seconds": "1.2"}\n',
    "t_tok.jsonl": '{"text": "a b", "tokens": "2", "gen_length": 64}\n',
}
"""The page's inputs of a few lines, so that nothing else is needed to try them."""
OWN = {name: text if isinstance(text, bytes) else text.encode() for name, text in OWN.items()}
needs_inputs = pytest.mark.skipif(not INPUTS.is_dir(), reason=f"the inputs are not at {INPUTS} (set MEDV_SHARED)")


@needs_inputs
def test_the_inputs_written_here_are_the_pages():
    assert {name: (INPUTS / name).read_bytes() for name in OWN} == OWN


class Hang(BaseException):
    """A command took too long; no handler of errors takes it."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The working folder: pictures in i, the bundled model in W, the page's inputs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundled("tiny_model"), "W")
    Path("i").mkdir()
    for name in ("a.png", "ok.png"):
        tiny.picture(1).save(Path("i", name))
    for name, content in OWN.items():
        Path(name).write_bytes(content)
    files(tmp_path, "ab")  # q.jsonl and a.jsonl for a judge


def medv(line, typed=""):
    """The command in this process; it must end in time, and never with a traceback or a character that a terminal obeys."""

    def too_long(*_):
        raise Hang(line)

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        done = CliRunner().invoke(app, shlex.split(line), input=typed)
    finally:
        signal.alarm(0)
    assert isinstance(done.exception, SystemExit | None), line
    assert "Traceback" not in done.stderr and not set(done.stdout + done.stderr) & set("\x1b\x07\x9b\u202e")
    return done


def told(line):
    """What the command answers in JSON."""
    done = medv(f"{line} --json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def refused(line, *words, typed=""):
    """Exit code 2, one sentence with these words, and every file as it was."""
    before = tree(Path())
    done = medv(line, typed)
    assert done.exit_code == 2 and (done.stderr.count("medv: ") == 1 or "Usage:" in done.stderr), done.output
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert tree(Path()) == before


def data_set(file, text, images="images", folder="F"):
    shutil.copytree("i", f"{folder}/{images}")
    Path(folder, file).write_bytes(text)


def rad(*kinds):
    """Rows of VQA-RAD with these phrase types."""
    row = {"image_name": "a.png", "answer": "yes", "answer_type": "CLOSED"}
    rows = [row | {"qid": n, "question": f"Is it {n}?", "phrase_type": kind} for n, kind in enumerate(kinds)]
    return json.dumps(rows).encode()


def odd(path, kind):
    Path(path).unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else Path(path).symlink_to("/dev/zero")


def pickled():
    (W / "model.safetensors").unlink()
    (W / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(Vtouch ran\ntR.")  # unpickled, it leaves a file


def with_code(file, changes):
    (W / "own.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Own: pass\n")
    edit(W / file, **changes)


def base_of_itself():
    (W / "model.safetensors").rename(W / "projector.safetensors")
    (W / "base.json").write_text('{"model": "."}')


EIGHT = rad(*("freeform",) * 8)
F_RAD = f"{TRAIN} --data vqa_rad --data-dir F"
CODE = {"config.json": {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "own.Own"]}},
        "processor_config.json": {"auto_map": {"AutoProcessor": "own.Own"}}}  # fmt: skip
ROADS = {"ask": ASK, "init": f"{TRAIN} --init W", "generate": f"{GENERATE} q_list.json"}
SPOILED = (("half", half, "missing"), ("nan", spoiled(float("nan")), "not finite"),
           ("inf", spoiled(float("inf")), "not finite"), ("int8", as_type(torch.int8), "as I8"))  # fmt: skip
CHECKPOINT = ROADS["generate"].replace("--model", "--checkpoint").replace(SHORT, "")
WHY = {"checkpoint": "not available"}  # before any code is looked for: the type is MedV's own
JUDGE = "judge --base-url http://127.0.0.1:1/v1 --questions q.jsonl --answers a.jsonl --out"
REFUSED = {
    **{
        fault: (None, f"{GENERATE} {fault.partition('-')[2]}.jsonl", f"{fault.partition('-')[2]}.jsonl {words}")
        for fault, (_, words) in ROWS.items()
    },
    **{
        f"A7-{kind}-{road}": (lambda how=how: change(W, how), line, "W", word)
        for kind, how, word in SPOILED
        for road, line in ROADS.items()
    },
    "A8-misnamed_pictures": (lambda: data_set("trainset.json", EIGHT, "pictures"), F_RAD, "F/trainset.json", "images or imgs"),
    "A9-testset_as_train": (lambda: data_set("testset.json", EIGHT), f"{F_RAD}/testset.json", "is the test file"),
    "A9-all_marked_test": (lambda: data_set("trainset.json", rad("test_para")), F_RAD, "trainset.json marks every row as test"),
    "A12-p_number": (None, "evaluate vqa --references ids_ref.json --predictions p_number.jsonl", "p_number.jsonl line 1"),
    "A14-gen_length_1024": (None, f"{GENERATE} q_list.json --gen-length 1024 --steps 128", "this model reads 512"),
    **{f"A17-epochs_{n}": (None, f"{TRAIN} --epochs {n}", "epochs") for n in ("0", "-1", "nan")},
    **{f"A17-temperature_{t}": (None, f"{ASK} --temperature {t}", "temperature") for t in ("nan", "inf", "1e-320")},
    "A17-temperature_generate": (None, f"{GENERATE} q_list.json --temperature nan", "temperature"),
    **{
        f"C1-{road}-{file}": (lambda file=file, changes=changes: with_code(file, changes), line, "W", WHY.get(road, "auto_map"))
        for road, line in {**ROADS, "checkpoint": CHECKPOINT}.items()
        for file, changes in CODE.items()
    },
    "C2-image_pipe": (lambda: odd("i/a.png", "pipe"), ASK, "i/a.png", "a pipe"),
    "C2-image_zero": (lambda: odd("i/a.png", "zero"), ASK, "i/a.png", "a device"),
    "C2-shard_pipe": (lambda: odd("W/model.safetensors", "pipe"), ASK, "W", "a pipe"),
    "C2-shard_zero": (lambda: odd("W/model.safetensors", "zero"), ASK, "W", "a device"),
    "C2-questions_pipe": (lambda: odd("q", "pipe"), f"{GENERATE} q", "q is a pipe"),
    "C2-questions_zero": (None, f"{GENERATE} /dev/zero", "/dev/zero is a device"),
    "C2-out_zero": (None, f"{GENERATE} q_list.json --out /dev/zero", "/dev/zero is not a file"),
    "C2-out_judge_pipe": (lambda: odd("p", "pipe"), f"{JUDGE} p", "p is not a file"),
    "A5-judge_out_is_answers": (None, f"{JUDGE} a.jsonl", "the output a.jsonl is also an input"),
    "A5-judge_out_is_questions": (None, f"{JUDGE} q.jsonl", "the output q.jsonl is also an input"),
    "C3-layers": (lambda: edit(CONFIG, text_config__num_hidden_layers=100_000_000), ASK, "W", "num_hidden_layers"),
    "C3-grids": (lambda: edit(CONFIG, image_aspect="anyres", image_grid=[[999_999, 999_999]]), ASK, "W", "image_grid"),
    "C4-ask": (None, ASK.replace("i/a.png", "'\x1b]0;owned\x07.png'"), r"\x1b]0;owned\x07.png does not exist"),
    "C4-ask_model": (None, f"{ASK} --model 'W\x1b[31m'", r"W\x1b[31m"),
    "C6-bin": (pickled, ASK, "W", "pickle", "medv convert"),
    "D-weights_wrong_size": (lambda: change(W, resized), ASK, "W", "mismatched"),
    "D-hidden_size_abc": (lambda: edit(CONFIG, text_config__hidden_size="abc"), ASK, "W"),
    "D-base_dot": (base_of_itself, ASK, "leads back"),
    "D-zero_division": (lambda: edit(CONFIG, vision_config__patch_size=0), ASK, "W"),
    "D-t_sec": (None, "evaluate text --answers t_sec.jsonl", "t_sec.jsonl line 1", "'seconds' is '1.2'"),
    "D-t_tok": (None, "evaluate text --answers t_tok.jsonl", "t_tok.jsonl line 1", "'tokens' is '2'"),
    **{
        f"D-{name}-{road}": (lambda name=name: data_set("x_instruct.json", OWN[name]), line, "x_instruct.json", word)
        for name, word in (("llava_image_null.json", "'image' is null"), ("llava_image_nan.json", "NaN"))
        for road, line in (("check", "data check llava_med_instruct F"),
                           ("train", "train instruct --profile smoke --out out --data llava_med_instruct --data-dir F"))
    },
    "D-pretrain_paper": (None, "train pretrain --profile paper --out out", "paper", "towers trained elsewhere"),
    "D-gen_length_ask": (None, f"{ASK} --gen-length 10000000019", "gen_length"),
    "D-steps_ask": (None, f"{ASK} --steps 1000000000", "steps"),
    "D-image_folder": (None, f"ask i What? --model W {SHORT}", "i is a folder"),
    "D-answers_folder": (None, "evaluate text --answers i", "i is a folder"),
    "D-long_image": (None, f"ask {LONG} What? --model W {SHORT}", "too long a name"),
    "D-long_out": (None, f"{GENERATE} q_list.json --out {LONG}", "too long a name"),
    "D-out_below_a_file": (None, f"{GENERATE} q_list.json --out /proc/version/out.jsonl", "/proc/version"),
    "D-unwritable_out": (None, f"{TRAIN} --out /proc/out", "/proc/out"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_in_a_sentence(fault):
    prepare, line, *words = REFUSED[fault]
    if prepare is not None:
        prepare()
    refused(line, *words, typed="y\n" * 50)
    assert not Path("ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q_list.json", "q_bom.jsonl", "q_crlf.jsonl"], ids="D-{}".format)
def test_questions_in_every_sound_form_are_answered(name):
    assert medv(f"{GENERATE} {name}").exit_code == 0
    asked = ["1", "2"] if "crlf" in name else ["1"]
    assert [json.loads(line)["question_id"] for line in Path("out.jsonl").read_text().splitlines()] == asked


@pytest.mark.parametrize("identity", ["2.0", "2", '"2"', '"0002"', '"q2"'], ids="A12-{}".format)
def test_answers_are_paired_by_id(identity):
    given = Path("ids_pred_float.jsonl").read_text()
    Path("p.jsonl").write_text(given.replace("1.0", identity.replace("2", "1")).replace("2.0", identity))
    assert told("evaluate vqa --references ids_ref.json --predictions p.jsonl")["closed_accuracy"] == 100


@needs_inputs
@pytest.mark.parametrize("name", ["ids_int_shuffled.jsonl", "ids_float_shuffled.jsonl"], ids="A12-{}".format)
def test_shuffled_answers_are_paired_by_id(name):
    line = f"evaluate vqa --references {SHARED}/data/vqa_rad/testset.json --predictions {INPUTS}/{name}"
    assert told(line)["closed_accuracy"] == 100


@pytest.mark.parametrize(("references", "closed", "opened"), [("pv1.json", 2, 1), ("sl2.json", 0, 1)], ids=["A16-pv1", "D-sl2"])
def test_answer_types_are_known_in_any_case(references, closed, opened):
    Path("p.jsonl").write_text('{"text": "yes"}\n' * (closed + opened))
    scores = told(f"evaluate vqa --references {references} --predictions p.jsonl")
    assert (scores["n_closed"], scores["n_open"]) == (closed, opened)


@pytest.mark.parametrize(
    ("lines", "overall", "unjudged"),
    [
        ('{"question_id": 1, "result": "8/10"}\n{"question_id": 2, "result": "8 4"}\n', 50.0, ["1"]),
        (OWN["j5.jsonl"].decode(), 87.5, ["line 2"]),
    ],
    ids=["A18-of_ten", "D-j5"],
)
def test_judgements_are_read_or_listed(lines, overall, unjudged):
    Path("j.jsonl").write_text(lines)
    scores = told("evaluate judge --judgements j.jsonl")
    assert (scores["overall"], [item["question_id"] for item in scores["unjudged"]]) == (overall, unjudged)


@needs_inputs
@pytest.mark.parametrize("temperature", ["", "--temperature none"], ids=["B1-the_pages_questions", "B2-no_temperature"])
def test_a_judge_is_asked_the_pages_questions(temperature):
    with StubJudge(lambda *_: "<think>1 2</think>8 4") as stub:
        line = f"judge --questions {INPUTS}/judge_q.jsonl --answers {INPUTS}/judge_a.jsonl --out j.jsonl"
        done = medv(f"{line} --base-url {stub.url} {temperature}")
    assert done.exit_code == 0 and "overall (2 questions)" in " ".join(done.stdout.split())
    assert all(("temperature" in body) == (not temperature) for body in stub.bodies) and len(stub.bodies) == 2


@pytest.mark.slow
def test_train_and_test_of_the_one_file_are_apart_A9_one_file():
    data_set("VQA_RAD Dataset Public.json", rad(*("freeform", "test_freeform") * 8, "frame"))
    assert told(f"{F_RAD} --epochs 2")["steps"] == 2  # of a batch of eight each
    done = medv(f"{GENERATE} 'F/VQA_RAD Dataset Public.json' --data vqa_rad")
    assert done.exit_code == 0 and "8 answers in out.jsonl" in done.stdout


@pytest.mark.slow
def test_links_into_a_named_root_are_followed_B5():
    data_set("trainset.json", EIGHT)
    Path("F/images").rename("blobs")
    Path("F/images").mkdir()
    Path("F/images/a.png").symlink_to("../../blobs/a.png")
    refused(F_RAD, "--image-root")
    refused("data check vqa_rad F", "--image-root")
    assert told(f"{F_RAD} --epochs 1 --image-root blobs")["steps"] == 1


def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on_D_disk_full():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StubJudge(lambda *_: "8 4") as stub:
        line = f"judge --questions q.jsonl --answers a.jsonl --out j.jsonl --base-url {stub.url}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        try:
            done = medv(line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert done.exit_code == 2 and "j.jsonl cannot be written" in done.stderr and done.stderr.count("medv: ") == 1
        assert medv(line).exit_code == 0 and len(Path("j.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_second_training_at_once_and_another_one_later_are_refused_A3_A4():
    data_set("trainset.json", EIGHT)
    line = f"{F_RAD} --epochs 40 --init W"
    process = start_command(Path("said"), *shlex.split(line))
    try:
        while not list(Path("out").glob("checkpoints/*/complete.json")):
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)  # it still holds the folder
        second = medv(line)
    finally:
        process.kill()
        process.join()
    assert second.exit_code == 2 and "another process" in second.stderr  # A4
    Path("out/.lock").unlink()
    kept, rows = (W / "model.safetensors").read_bytes(), Path("F/trainset.json").read_text()
    change(W, spoiled(0.5))
    refused(line, "out", "init.weights changed")  # another model in the place of --init
    refused(line.replace("--init W", ""), "out", "init.weights changed")
    (W / "model.safetensors").write_bytes(kept)
    Path("F/trainset.json").write_text(rows.replace('"yes"', '"no"'))
    refused(line, "out", "data.rows changed")  # all answers
    Path("F/trainset.json").write_text(rows)
    data_set("trainset.json", EIGHT, folder="G")
    tiny.picture(5).save("G/images/a.png")
    refused(line.replace("F", "G"), "out", "data.images changed")  # a data set of the same size
