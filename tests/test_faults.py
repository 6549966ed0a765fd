"""Every fault of the page "Faults found by use", tried again as the page gives it: the command line, its inputs, small models.

A test's id begins with the page's number. What another test tries already, with the same input by the same road, stands here:

| fault | tried by |
|---|---|
| A1 another stage, seed, LoRA, profile, init or data | \
test_continuing::test_another_training_into_a_finished_folder_is_refused |
| A2 --out is --init, or any model's folder | test_continuing::test_models_and_files_of_others_are_not_trained_over |
| A5 notes, the question file as --out | test_continuing::test_answers_go_to_no_file_that_is_not_theirs |
| A6 another model or image in its place | test_continuing::test_answers_go_on_only_with_the_same_model_questions_and_images |
| A8 all sets | test_training_set::test_every_set_without_its_pictures_is_refused |
| A10, A11 palette16, palette8, voilut | test_dicom::test_palettes_of_both_depths_give_the_same_picture, \
test_dicom::test_the_voi_table_of_a_header_is_applied |
| A14 a question of 100,000 characters | test_cli::test_one_question_of_a_hundred_thousand_characters_is_refused_by_its_id |
| A15 sixteen bits; an array, a path | test_processing::test_a_picture_in_memory_is_seen_as_open_image_sees_its_file, \
test_processing::test_what_is_no_picture_is_refused_and_told_what_is |
| A17 warmup 5; papermill -p seed abc | test_continuing::test_a_recipe_has_no_number_without_a_meaning, \
test_continuing::test_a_notebook_refuses_parameters_of_another_kind |
| B1 the README's judge | test_judging::test_the_command_of_the_readme_prints_its_table |
| B2 no temperature | test_judging::test_a_judge_that_refuses_a_temperature_judges_without_and_the_table_says_so |
| B2 dialects; refusals, asked once | test_judging::test_each_dialect_of_a_judge_is_read, \
test_judging::test_what_asking_again_cannot_mend_is_asked_once_and_listed_with_the_raw_text |
| B2 insufficient_quota | test_judging::test_a_quota_that_is_used_up_is_one_sentence_and_the_rest_is_not_asked |
| B3 Retry-After, 200,000 brackets, slow headers | \
test_judging::test_each_kind_of_trouble_that_stays_is_listed_with_its_reason |
| B3 Ctrl-C | test_judging::test_an_interrupted_run_ends_soon_and_keeps_what_is_finished |
| B4 socks5; IPv6 | test_judging::test_proxies_that_cannot_be_used_are_one_sentence, \
test_judging::test_a_network_without_proxy_is_no_trouble |
| B5 links, generate | test_cli::test_images_may_be_links_into_a_named_root |
| B6 --skip-corrupt | test_cli::test_images_that_cannot_be_read_stop_a_benchmark_or_are_left_out_counted_and_listed |
| C1 ask, `yes \\|` | test_loading::test_code_of_a_model_never_runs_whatever_is_typed |
| C1 below a projector or adapters, towers | test_loading::test_code_of_what_lies_below_never_runs |
| C2 a pipe or a folder as --out | test_cli::test_answers_are_not_written_over_what_is_no_file |
| C2 a deflated bomb | test_dicom::test_a_deflated_file_is_refused_before_it_is_inflated |
| C4 data check, evaluate | test_console::test_answers_ids_and_names_from_files_are_shown_and_not_obeyed |
| C5 availability; make lab | test_loading::test_availability_looks_at_the_disk_alone, \
test_house::test_make_lab_asks_nobody_for_news_updates_or_extensions |
| D truncated and empty weights | test_loading::test_a_damaged_weight_file_is_one_sentence_at_the_command_line |
| D lone surrogate of a shell | test_cli::test_a_question_that_is_no_text_is_refused |
| D generate --out FOLDER | test_cli::test_answers_are_not_written_over_what_is_no_file |
| D an empty training set | test_continuing::test_a_training_set_without_examples_is_refused |
| D papermill -p out 5 | test_continuing::test_a_notebook_refuses_parameters_of_another_kind |
| D a missing decoder | test_dicom::test_the_reason_and_the_mend_of_a_decoder_that_failed_are_told_whole |
| D long answers, many steps, generate | \
test_cli::test_a_canvas_longer_than_the_model_reads_is_refused_before_anything_is_written |
"""

import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from stub_judge import StubJudge
from test_continuing import tree
from test_judging import files
from test_loading import as_type, change, edit, half, resized, spoiled
from typer.testing import CliRunner

from medv.cli import app
from medv.data.images import open_image
from medv.model.bundled import bundled

SHARED = Path(os.environ.get("MEDV_SHARED", Path(__file__).parents[1] / "../shared")).resolve()
INPUTS = SHARED / "faults/inputs"
LONGEST = 20
"""Seconds for one command; what the page calls a hang took minutes."""
SHORT = "--gen-length 8 --block-length 8 --steps 4"
ASK = f"ask i/a.png What? --model m {SHORT}"
GENERATE = f"generate --images i --model m --out out.jsonl {SHORT} --questions"
TRAIN = "train vqa --profile smoke --out out"
L1024 = "--gen-length 1024 --block-length 8 --steps 128"
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
needs_inputs = pytest.mark.skipif(
    not INPUTS.is_dir(), reason=f"the page's inputs are not at {INPUTS} (set MEDV_SHARED)"
)


@needs_inputs
def test_the_inputs_written_here_are_the_pages():
    assert {name: (INPUTS / name).read_bytes() for name in OWN} == OWN


class Hang(BaseException):
    """A command took too long; no handler of errors takes it."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The working folder: pictures in i, the bundled model in m, the page's inputs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundled("tiny_model"), "m")
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
    assert done.exit_code == 2, done.output
    sentence = done.stderr[done.stderr.index("medv: ") :] if "medv: " in done.stderr else done.stderr
    assert done.stderr.count("medv: ") == 1 or "Usage:" in done.stderr
    assert [word for word in words if word not in sentence] == [], sentence
    assert tree(Path()) == before


def weights(how):
    return lambda: change(Path("m"), how)


def setting(**changes):
    return lambda: edit(Path("m/config.json"), **changes)


def real_set(*rows, file="trainset.json", images="images", folder="F"):
    """Makes a folder of VQA-RAD with these phrase types."""

    def make():
        shutil.copytree("i", f"{folder}/{images}")
        common = {"image_name": "a.png", "answer": "yes", "answer_type": "CLOSED"}
        listed = [common | {"qid": n, "question": f"Is it {n}?", "phrase_type": kind} for n, kind in enumerate(rows)]
        Path(folder, file).write_text(json.dumps(listed))

    return make


def dialogues(name):
    def make():
        shutil.copytree("i", "F/images")
        shutil.copy(name, "F/llava_med_instruct_60k.json")

    return make


def pipe(path):
    return lambda: (Path(path).unlink(missing_ok=True), os.mkfifo(path))


def endless(path):
    return lambda: (Path(path).unlink(missing_ok=True), Path(path).symlink_to("/dev/zero"))


class Own:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def pickled():
    Path("m/model.safetensors").unlink()
    Path("m/pytorch_model.bin").write_bytes(pickle.dumps(Own()))


def with_code(file, **changes):
    def make():
        Path("m/own.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Own: pass\n")
        edit(Path("m", file), **changes)

    return make


def base_of_itself():
    Path("m/model.safetensors").rename("m/projector.safetensors")
    Path("m/base.json").write_text('{"model": "."}')


def nothing():
    pass


RAD, F_RAD = ("freeform",) * 8, f"{TRAIN} --data vqa_rad --data-dir F"
CODE = {"config.json": {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "own.Own"]}},
        "processor_config.json": {"auto_map": {"AutoProcessor": "own.Own"}}}  # fmt: skip
JUDGE = "judge --base-url http://127.0.0.1:1/v1 --questions q.jsonl --answers a.jsonl --out"
REFUSED = {
    **{
        fault: (nothing, f"{GENERATE} {fault.partition('-')[2]}.jsonl", f"{fault.partition('-')[2]}.jsonl {words}")
        for fault, (_, words) in ROWS.items()
    },
    "A7-half_ask": (weights(half), ASK, "m", "missing"),
    "A7-nan_ask": (weights(spoiled(float("nan"))), ASK, "m", "not finite"),
    "A7-inf_ask": (weights(spoiled(float("inf"))), ASK, "m", "not finite"),
    "A7-int8_ask": (weights(as_type(torch.int8)), ASK, "m", "I8"),
    "A7-half_init": (weights(half), f"{TRAIN} --init m", "m", "missing"),
    "A7-nan_init": (weights(spoiled(float("nan"))), f"{TRAIN} --init m", "m", "not finite"),
    "A7-nan_generate": (weights(spoiled(float("nan"))), f"{GENERATE} q_list.json", "m", "not finite"),
    "A8-misnamed_pictures": (real_set(*RAD, images="pictures"), F_RAD, "F/trainset.json", "images or imgs"),
    "A9-testset_as_train": (real_set(*RAD, file="testset.json"), f"{F_RAD}/testset.json", "F/testset.json", "the test file"),
    "A9-all_marked_test": (real_set("test_freeform", "test_para"), F_RAD, "F/trainset.json", "test"),
    "A12-p_number": (nothing, "evaluate vqa --references ids_ref.json --predictions p_number.jsonl", "p_number.jsonl line 1"),
    "A14-gen_length_1024": (nothing, GENERATE.replace(SHORT, L1024) + " q_list.json", "this model reads 512"),
    **{f"A17-epochs_{n}": (nothing, f"{TRAIN} --epochs {n}", "epochs") for n in ("0", "-1", "nan")},
    **{f"A17-temperature_{t}": (nothing, f"{ASK} --temperature {t}", "temperature") for t in ("nan", "inf", "1e-320")},
    "A17-temperature_generate": (nothing, f"{GENERATE} q_list.json --temperature nan", "temperature"),
    **{
        f"C1-{road}-{file}": (with_code(file, **changes), line, "m", "auto_map")
        for road, line in (("init", f"{TRAIN} --init m"), ("generate", f"{GENERATE} q_list.json"),
                           ("checkpoint", f"{GENERATE} q_list.json".replace("--model", "--checkpoint")))
        for file, changes in CODE.items()
    },
    "C2-image_pipe": (pipe("i/a.png"), ASK, "i/a.png", "a pipe"),
    "C2-image_zero": (endless("i/a.png"), ASK, "i/a.png", "a device"),
    "C2-shard_pipe": (pipe("m/model.safetensors"), ASK, "m", "a pipe"),
    "C2-shard_zero": (endless("m/model.safetensors"), ASK, "m", "a device"),
    "C2-questions_pipe": (pipe("q"), f"{GENERATE} q", "q is a pipe"),
    "C2-questions_zero": (nothing, f"{GENERATE} /dev/zero", "/dev/zero is a device"),
    "C2-out_zero": (nothing, f"{GENERATE} q_list.json --out /dev/zero", "/dev/zero is not a file"),
    "C2-out_judge_pipe": (pipe("p"), f"{JUDGE} p", "p is not a file"),
    "A5-judge_out_is_answers": (nothing, f"{JUDGE} a.jsonl", "--out a.jsonl is also an input"),
    "A5-judge_out_is_questions": (nothing, f"{JUDGE} q.jsonl", "--out q.jsonl is also an input"),
    "C3-layers": (setting(text_config__num_hidden_layers=100_000_000), ASK, "m", "num_hidden_layers"),
    "C3-grids": (setting(image_aspect="anyres", image_grid=[[999_999, 999_999]]), ASK, "m", "image_grid"),
    "C4-ask": (nothing, ASK.replace("i/a.png", "'\x1b]0;owned\x07.png'"), r"\x1b]0;owned\x07.png does not exist"),
    "C4-ask_model": (nothing, f"{ASK} --model 'm\x1b[31m'", r"m\x1b[31m"),
    "C6-bin": (pickled, ASK, "m", "pickle", "medv convert"),
    "D-weights_wrong_size": (weights(resized), ASK, "m", "mismatched"),
    "D-hidden_size_abc": (setting(text_config__hidden_size="abc"), ASK, "m"),
    "D-base_dot": (base_of_itself, ASK, "leads back"),
    "D-zero_division": (setting(vision_config__patch_size=0), ASK, "m"),
    "D-t_sec": (nothing, "evaluate text --answers t_sec.jsonl", "t_sec.jsonl line 1", "'seconds' is '1.2'"),
    "D-t_tok": (nothing, "evaluate text --answers t_tok.jsonl", "t_tok.jsonl line 1", "'tokens' is '2'"),
    **{
        f"D-llava_image_{kind}-{road}": (dialogues(f"llava_image_{kind}.json"), line, "60k.json", word)
        for kind, word in (("null", "'image' is null"), ("nan", "NaN"))
        for road, line in (("check", "data check llava_med_instruct F"),
                           ("train", "train instruct --profile smoke --out out --data llava_med_instruct --data-dir F"))
    },
    "D-pretrain_paper": (nothing, "train pretrain --profile paper --out out", "paper", "towers trained elsewhere"),
    "D-gen_length_ask": (nothing, f"{ASK} --gen-length 10000000019", "gen_length"),
    "D-steps_ask": (nothing, f"{ASK} --steps 1000000000", "steps"),
    "D-image_folder": (nothing, f"ask i What? --model m {SHORT}", "i is a folder"),
    "D-answers_folder": (nothing, "evaluate text --answers i", "i is a folder"),
    "D-long_image": (nothing, f"ask {LONG} What? --model m {SHORT}", "too long a name"),
    "D-long_out": (nothing, f"{GENERATE} q_list.json --out {LONG}", "too long a name"),
    "D-out_below_a_file": (nothing, f"{GENERATE} q_list.json --out /proc/version/out.jsonl", "/proc/version"),
    "D-unwritable_out": (nothing, f"{TRAIN} --out /proc/out", "/proc/out"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_in_a_sentence(fault):
    prepare, line, *words = REFUSED[fault]
    prepare()
    refused(line, *words, typed="y\n" * 50)
    assert not Path("ran").exists()


# What is not refused gives the right values.


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


@pytest.mark.parametrize(
    ("references", "closed", "opened"), [("pv1.json", 2, 1), ("sl2.json", 0, 1)], ids=["A16-pv1", "D-sl2"]
)
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


@needs_inputs
def test_a_constant_image_of_sixteen_bits_has_its_value_A15_const16():
    image = Image.open(INPUTS / "const16.png")
    seen = np.asarray(open_image(INPUTS / "const16.png")).astype(float)
    pixels = tiny.processor()(images=image, text="Where?")["pixel_values"]
    assert pixels.min() == pixels.max() == pytest.approx(seen.mean() / 127.5 - 1, abs=1e-3)


def test_train_and_test_of_the_one_file_are_apart_A9_one_file():
    real_set(*RAD, *("test_freeform",) * 8, "frame", file="VQA_RAD Dataset Public.json")()
    assert told(f"{F_RAD} --epochs 2")["steps"] == 2  # of a batch of eight each
    done = medv(f"{GENERATE} 'F/VQA_RAD Dataset Public.json' --data vqa_rad")
    assert done.exit_code == 0 and "8 answers in out.jsonl" in done.stdout


def test_links_into_a_named_root_are_followed_B5():
    real_set(*RAD)()
    Path("F/images").rename("blobs")
    Path("F/images").mkdir()
    Path("F/images/a.png").symlink_to("../../blobs/a.png")
    for line in (F_RAD, "data check vqa_rad F"):
        refused(line, "--image-root")
    assert told(f"{F_RAD} --epochs 1 --image-root blobs")["steps"] == 1
    Path("F/trainset.json").rename("F/testset.json")
    assert "missing" not in medv("data check vqa_rad F --image-root blobs").stdout


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


@pytest.fixture
def stopped():
    """A training of `m` on `F`, killed after its first checkpoint: its line, and what a second one said meanwhile."""
    real_set(*RAD)()
    line = f"{F_RAD} --epochs 40 --init m"
    process = subprocess.Popen([sys.executable, "-m", "medv", *shlex.split(line)], stderr=subprocess.DEVNULL)
    try:
        while not list(Path("out").glob("checkpoints/*/complete.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # it still holds the folder
        second = medv(line)
    finally:
        process.kill()
        process.wait()
    Path("out/.lock").unlink()
    return line, second


def test_a_second_training_and_another_one_later_are_refused_A3_A4(stopped):
    line, second = stopped
    assert second.exit_code == 2 and "another process" in second.stderr  # A4
    kept, rows = Path("m/model.safetensors").read_bytes(), Path("F/trainset.json").read_text()
    change(Path("m"), spoiled(0.5))
    refused(line, "out", "init.weights changed")  # another model in the place of --init
    refused(line.replace("--init m", ""), "out", "init.weights changed")
    Path("m/model.safetensors").write_bytes(kept)
    Path("F/trainset.json").write_text(rows.replace('"yes"', '"no"'))
    refused(line, "out", "data.rows changed")  # all answers
    Path("F/trainset.json").write_text(rows)
    real_set(*RAD, folder="G")()
    tiny.picture(5).save("G/images/a.png")
    refused(line.replace("F", "G"), "out", "data.images changed")  # a data set of the same size
