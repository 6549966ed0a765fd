"""The configuration file, and what notebooks make of it: materials are read, missed, adopted and judged, nothing is made up.

`python tests/paper_world.py FOLDER --kills 2` makes all twenty exhibits of the same world (about ten minutes).
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paper_world import DATA, judged, write_config, write_data, write_weights
from safetensors.torch import load_file
from stub_judge import StubJudge
from typer.testing import CliRunner

from medv.artifacts import atomic_directory
from medv.cli import app
from medv.companion.reproduction import cache
from medv.companion.reproduction.cache import FORCE_KEY, Workshop
from medv.companion.reproduction.materials import Materials
from medv.companion.reproduction.registry import EXHIBITS, nodes_for
from medv.companion.reproduction.run import open_run
from medv.companion.studies import generation
from medv.companion.studies.conversation import answer_all
from medv.companion.studies.machine import Machine, adjusted
from medv.companion.studies.requests import judge_of, requests_for
from medv.companion.studies.summaries import check_effects
from medv.evaluation.answering import Answerer
from medv.evaluation.judge_client import KEYS
from medv.intervals import NOT_MEASURED
from medv.profiles import PAPER, PROFILES, get_profile
from medv.training.examples import TrainingData

needs_data = pytest.mark.skipif(not (DATA / "qa50").is_dir(), reason=f"no annotations at {DATA}: set MEDV_DATA")


def written(folder, text):
    (folder / "medv.toml").write_text(text)
    return folder / "medv.toml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_weights(root)
    write_data(root)
    write_config(root)
    return root


def test_every_profile_comes_back_from_json():
    for profile in PROFILES.values():
        assert adjusted(get_profile(profile.name), json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[weigths]\nlanguage = 'a'", "no section 'weigths': choose from weights"),
        ("[weights]\nlangauge = 'a'", r"\[weights\] has no 'langauge': choose from language"),
        ("[data]\nvqa_rad = 3", "vqa_rad is 3, but must be a path"),
        ("data = 'x'", r"data is 'x', but must be a table \[data\]"),
        ("[machine]\nprocesses = 0", "processes is 0: it must be at least 1"),
        ("[machine]\ndeepspeed = 'zero9'", "unknown DeepSpeed configuration 'zero9'"),
        ("[judge]\nkey = 'secret'", r"\[judge\] has no 'key'"),
        ("[baselines.x]\nanswer = 'a'", r"\[x\] has no 'answer'"),
        ("[judge\n", "is no TOML file"),
        ("[judge]\nmodel = 2020-01-01", r"model of \[judge\] is datetime.*must be like"),
        ("[judge]\ntemperature = 'a'", r"temperature of \[judge\] is 'a'"),
        ("[weights]\nvision = '~nobody-at-all/x'", "is no path here"),
        ("[baselines.x]", r"\[baselines.x\] is empty"),
        ("[baselines.x]\ncheckpoint = 'a'", "has no 'checkpoint'"),
    ],
)
def test_a_name_that_nothing_reads_is_refused_with_those_that_are(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        Materials.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"describ": {}}, "has no 'describ'"),
        ({"describe": 3}, "must be like"),
        ({"seeds": 3}, "must be like"),
        ({"seeds": []}, "a profile has seeds"),
        ({"dtype": "float99"}, "float32, bfloat16 or float16"),
        ({"lora": {"sizes": [4]}}, "needs its own number in lora.steps"),
        ({"name": "tiny"}, "name of the profile cannot be changed"),
        ({"towers": "bundled"}, "towers of the profile cannot be changed"),
    ],
)
def test_a_profile_takes_only_what_it_has(change, said):
    with pytest.raises(ValueError, match=said):
        Materials(profile=change).of(PAPER)


def test_paths_start_at_the_file_and_the_profile_is_changed(tmp_path):
    text = "[weights]\nstage2 = 'w'\n[data]\nqa50 = '/q'\n[profile]\ndescribe = {steps = 8}\n[profile.lora]\nrates = {0 = 1e-5}"
    found = Materials.read(written(tmp_path, text))
    assert found.path("stage2") == tmp_path / "w" and str(found.path("qa50")) == "/q" and found.path("slake") is None
    profile = found.of(PAPER)
    assert profile.describe.steps == 8 and profile.describe.gen_length == 256 and profile.lora.rates == {0: 1e-5}


def test_without_a_file_every_exhibit_says_what_is_missing():
    result = CliRunner().invoke(app, ["reproduce", "--profile", "paper", "--dry-run", "--out", "unused"])
    assert result.exit_code == 0 and "blocked" in result.output
    nodes = {node.name: Materials().missing(node, PAPER) for node in nodes_for(PAPER)}
    assert [name for name, lost in nodes.items() if not lost] == ["data", "corruption", "model", "twin", "report"]
    assert "qa50 is missing: name it under [data]" in nodes["repetition"][0]
    assert "vqa_rad is missing" in nodes["lora"][0] and "slake, pathvqa" in nodes["lora"][0]
    assert all(not Materials().missing(node, get_profile("tiny")) for node in nodes_for(get_profile("tiny")))


def test_a_card_without_a_known_peak_is_refused_and_not_laid_to_the_file(tmp_path):
    told = CliRunner().invoke(app, ["config", "check", str(written(tmp_path, "")), "--card", "toaster"])
    assert told.exit_code == 2 and "the peak of a card 'toaster' is not known" in " ".join(told.stderr.split())


def test_a_run_never_falls_back_to_phantoms_where_real_data_are_wanted(tmp_path):
    for profile in ("paper", "smoke"):
        run = open_run("repetition", profile=profile, out=tmp_path)
        if profile == "smoke":
            assert run.data("qa50").name == "phantoms"
        else:
            with pytest.raises(FileNotFoundError, match=r"name it under \[data\] in the configuration file"):
                run.data("qa50")


def test_a_model_of_the_file_is_linked_and_not_trained(tmp_path, model_dir):
    config = written(tmp_path, f"[weights]\nstage2 = '{model_dir}'")
    run = open_run("stage2", profile="smoke", out=tmp_path / "run", config=config)
    assert run.obtain("models/stage2", lambda _: pytest.fail("it was trained")) == {"models/stage2": "given"}
    assert (tmp_path / "run/models/stage2").resolve() == model_dir.resolve()


def obtained(folder, stage2, train=lambda _: pytest.fail("it was trained")):
    """What the place of stage 2 is after `Run.obtain` with this model in the configuration file."""
    config = written(folder, f"[weights]\nstage2 = '{stage2}'" if stage2 else "")
    open_run("stage2", profile="smoke", out=folder / "run", config=config).obtain("models/stage2", train)
    return (folder / "run/models/stage2").resolve()


def test_another_model_of_the_file_replaces_the_link_but_no_training(tmp_path, monkeypatch):
    first, second, moved = tmp_path / "first", tmp_path / "second", tmp_path / "moved"
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    assert obtained(tmp_path, first) == first and obtained(tmp_path, second) == second
    second.rename(moved)
    with pytest.raises(ValueError, match="which is gone: name it under"):
        obtained(tmp_path, None)
    assert obtained(tmp_path, moved) == moved
    monkeypatch.setenv(FORCE_KEY, "1")
    assert obtained(tmp_path, first) == first
    monkeypatch.delenv(FORCE_KEY)
    (tmp_path / "run/models/stage2").unlink()
    trained = obtained(tmp_path, None, lambda folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(ValueError, match="move it away, or leave stage2 out of the file"):
        obtained(tmp_path, first)
    assert (trained / "config.json").is_file() and obtained(tmp_path, trained) == trained
    with pytest.raises(FileNotFoundError, match="stage2 is not there"):
        obtained(tmp_path, tmp_path / "lost")


def test_a_linked_folder_is_replaced_and_its_target_kept(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_directory(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "target/kept").exists() and [file.name for file in (tmp_path / "link").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_what_a_notebook_reads_of_the_file_is_in_its_fingerprint(tmp_path):
    nodes = {node.name: node for node in nodes_for(PAPER)}
    (tmp_path / "a.jsonl").write_text("old")
    config = written(tmp_path, "[weights]\nstage1 = 's'\n[baselines.Other]\nanswers = 'a.jsonl'")
    shop = Workshop(Path(__file__).parents[1] / "notebooks", tmp_path, PAPER, 0, Materials.read(config))
    assert "stage1" in shop.materials.read_by(nodes["stage1"]) and not shop.materials.read_by(nodes["stage2"])
    node = replace(nodes["open_conversation"], needs=())
    before = shop.made_from(node)
    (tmp_path / "a.jsonl").write_text("new")
    assert list(cache._differences(before, shop.made_from(node))) == ["input answers of Other changed"]
    assert not shop.materials.contents(nodes["repetition"])


def test_folders_and_files_that_are_not_what_they_are_called_are_named_before_the_run(tmp_path):
    text = "[weights]\ngeneral = '.'\nstage3 = 'lost'\n[data]\nqa50 = '.'\nslake = '.'\n[baselines.Other]\nanswers = 'no.jsonl'"
    materials = Materials.read(written(tmp_path, text))
    lost = {node.name: "; ".join(materials.missing(node, PAPER)) for node in nodes_for(PAPER)}
    assert "general of the configuration file is no model" in lost["open_conversation"]
    assert "answers of Other is not there" in lost["open_conversation"] and "answers of Other" not in lost["repetition"]
    assert "has no qa50 test file" in lost["repetition"] and "has no slake train file" in lost["data"]
    assert "stage3 is not there" in lost["stage3"]


def test_a_baseline_has_a_name_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="'stage 2' has the name of a model of this run"):
        answer_all(PAPER, {"stage 2": (tmp_path, False)}, [], tmp_path, given={"stage 2": tmp_path})


def test_the_check_says_what_stops_a_training_and_that_the_key_is_missing(tmp_path, monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    config = written(tmp_path, "[weights]\nlanguage = '.'\n[judge]\n[machine]\nprocesses = 3")
    found = json.loads(CliRunner().invoke(app, ["config", "check", str(config), "--json"]).stdout)
    assert "cannot be cut into 3 devices" in found["exhibits"]["table2"] and not found["complete"]
    assert any("no key for the judge" in note for note in found["notes"])


def test_a_killed_parent_takes_its_launcher_along(tmp_path):
    code = """
import subprocess, time
from medv.companion.studies.machine import _end_with_parent
print(subprocess.Popen(["sleep", "60"], preexec_fn=_end_with_parent).pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = Path(f"/proc/{parent.stdout.readline().strip()}/stat")
    assert child.exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it runs on")


def test_phantoms_are_never_judged_and_need_no_key(tmp_path, monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    run = open_run("repetition", profile="smoke", out=tmp_path, config=written(tmp_path, "[judge]\nmodel = 'gpt-4.1-mini'"))
    assert run.judge(run.data("qa50")) is None
    with pytest.raises(ValueError, match="needs a key"):
        run.judge(TrainingData("qa50", tmp_path))


@needs_data
@pytest.mark.slow
def test_the_check_counts_and_names_what_cannot_be_made(world, tmp_path):
    found = json.loads(CliRunner().invoke(app, ["config", "check", str(world / "paper.toml"), "--json"]).stdout)
    assert found["complete"] and list(found["exhibits"]) == list(EXHIBITS)
    assert "test overall 193" in found["data"]["qa50"] and "the paper 1797" in found["data"]["vqa_rad"]
    assert found["stages"]["instruct"]["hours"] > 0 and set(found["stages"]) > {"vqa slake", "vqa pathvqa"}
    less = (world / "paper.toml").read_text().replace('general = "general"', "").replace('slake = "slake"', 'slake = "lost"')
    (world / "less.toml").write_text(less)
    result = CliRunner().invoke(app, ["config", "check", str(world / "less.toml")])
    assert result.exit_code == 1 and "general is missing" in result.output and "lost" in result.output


@needs_data
@pytest.mark.slow
def test_answers_to_the_benchmark_are_judged_once_and_kept(world, tmp_path, capsys):
    source = TrainingData("qa50", world / "qa50")
    asked = requests_for(PAPER, source, 5)
    answers = [{"question_id": example.id, "text": "It is seen."} for example in asked]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    with StubJudge(judged) as stub:
        judge = judge_of(Materials(judge={"base_url": stub.url}).endpoint(), source)
        first = judge(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
        assert judge(tmp_path / "a.jsonl", tmp_path / "b.jsonl") == first and sum(stub.asked.values()) == 5
    assert set(first) == {example.id for example in asked} and all(np.isfinite(list(first.values())))
    with StubJudge(lambda *_: "It is good.") as stub:
        assert (
            judge_of(Materials(judge={"base_url": stub.url}).endpoint(), source)(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
            == {}
        )
    assert "5 answers of a.jsonl have no score and stand in no mean" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_and_accumulation_change_nothing_but_the_cost(tmp_path):
    small = adjusted(get_profile("smoke"), {"stages": {"instruct": {"samples": 8, "batch_size": 4}}})
    for name, machine in {"alone": Machine(), "workers": Machine(workers=2), "parts": Machine(accumulation=2)}.items():
        machine.train("instruct", small, tmp_path / name, quiet=True)
    alone, workers, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "workers", "parts"))
    assert all(alone[name].equal(workers[name]) and torch.allclose(alone[name], parts[name], atol=1e-5) for name in alone)


@pytest.mark.slow
def test_a_training_of_two_processes_is_that_of_one(tmp_path):
    small = adjusted(get_profile("smoke"), {"stages": {"vqa": {"samples": 8, "batch_size": 4}}})
    for processes in (1, 2):
        facts = Machine(processes=processes).train("vqa", small, tmp_path / str(processes), subset=(8, 4, 1), quiet=True)
        assert facts["steps"] == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    with pytest.raises(RuntimeError, match=r"the training of 2 processes failed: .*lower the sizes"):
        Machine(processes=2).train("vqa", small, tmp_path / "no", subset=(8, 9, 1))


@needs_data
@pytest.mark.slow
def test_real_questions_without_a_judge_have_no_score_and_no_verdict(world, tmp_path):
    run = open_run("generation_settings", profile="paper", out=tmp_path, config=world / "paper.toml")
    source, settings = run.data("qa50"), generation.table5_settings(run.profile)
    asked = generation.requests(run.profile, source)
    label = run.source(asked[0], world / "general", "qa50 questions")
    assert label["data"] == "real qa50 questions, judge stub" and not label["comparable"] and not label["gaps"]
    configs = generation.plain_configs(settings.groupby("group").nth([0, -1]), run.profile.describe)
    items = generation.ask_model(Answerer.load(world / "general"), configs, asked, tmp_path)
    assert items["score"].isna().all() and items["words"].notna().all()
    effects = check_effects(items, generation.table5_claims(settings)).set_index("metric")["appears here"]
    assert set(effects["score"]) == {NOT_MEASURED} and NOT_MEASURED not in set(effects["words"])
    scored = items.assign(score=50.0)
    effects = check_effects(scored, generation.table5_claims(settings)).set_index("metric")["appears here"]
    assert NOT_MEASURED not in set(effects["score"])
