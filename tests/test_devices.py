"""Where models go: the device there is, one GPU a process, more devices where one is too small, one copy for many settings."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from command import run

from medv.companion.studies.generation import ask_model
from medv.diffusion.caching import DualCache, NoCache
from medv.diffusion.config import SamplerConfig
from medv.evaluation import answering
from medv.evaluation.answering import Answerer
from medv.evaluation.benchmark import answer_file
from medv.model.devices import device_named, place, spread
from medv.profiles import get_profile
from medv.training.launch import join
from medv.training.trainer import OneDeviceArguments

BASE = SamplerConfig(16, 8, 16)


@pytest.fixture
def many_gpus(monkeypatch):
    """A machine with four GPUs, as far as torch is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


# Which device.


def test_the_best_device_is_the_gpu_of_this_process(many_gpus, monkeypatch):
    assert device_named() == device_named("cuda") == torch.device("cuda:0")
    assert device_named("cuda:2") == torch.device("cuda:2") and device_named("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_named() == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="no device cuda:4: this machine shows 4 CUDA devices"):
        device_named()


@pytest.mark.parametrize("mps", [False, True])
def test_without_a_gpu_it_is_mps_or_the_cpu(monkeypatch, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device_named() == torch.device("mps" if mps else "cpu")
    if not mps:
        with pytest.raises(ValueError, match="no device mps here"):
            device_named("mps")
    with pytest.raises(ValueError, match="no device cuda:0: this machine shows 0"):
        device_named("cuda")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        device_named("gpu")


def test_a_process_that_sees_four_gpus_trains_on_one_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.warns(UserWarning, match="one of 4 GPUs: for all of them, `torchrun --nproc_per_node 4"):
        join(None)
    arguments = OneDeviceArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 4  # what transformers finds there
    assert arguments.n_gpu == 1 and arguments.train_batch_size == arguments.per_device_train_batch_size


# What does not fit one device.


@pytest.mark.parametrize("cache", [NoCache(), DualCache(4)])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_the_sampler_works_on_a_model_that_is_kept_elsewhere_between_uses(monkeypatch, cache, cfg_scale):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    network, whole = tiny.model(), tiny.model()
    from accelerate import cpu_offload

    network.tie_weights()
    cpu_offload(network, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in network.model.language_model.layers.parameters())
    inputs = tiny.processor()(images=[tiny.picture(n) for n in (0, 1)], text=list(tiny.QUESTIONS[:2]))
    config = replace(BASE, cache=cache, cfg_scale=cfg_scale)
    assert network.generate(**inputs, config=config).sequences.equal(whole.generate(**inputs, config=config).sequences)
    texts = [
        [a.text for a in Answerer(m, tiny.processor()).answer(tiny.examples(2), config, quiet=True)] for m in (network, whole)
    ]
    assert texts[0] == texts[1]


def test_a_model_too_large_for_the_gpu_is_spread_and_one_too_large_for_all_is_refused(many_gpus, monkeypatch):
    asked = {}
    monkeypatch.setattr("accelerate.dispatch_model", lambda model, plan: asked.setdefault("plan", plan) and model)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    network = tiny.model()
    size = sum(value.nbytes for value in network.state_dict().values())
    halves = {0: size // 2, 1: size, "cpu": 0}
    spread(network, halves)
    parts = {where for name, where in asked["plan"].items() if "language_model" in name or name == "lm_head"}
    assert set(asked["plan"].values()) == {0, 1} and parts
    with pytest.raises(ValueError, match="fits neither the GPUs nor the CPU's memory"):
        spread(network, {0: size // 4, "cpu": size // 4})
    called = []
    monkeypatch.setattr("medv.model.devices.spread", lambda model: called.append(model) or model)
    place(network)
    assert called == [network]


# One model, many settings.


@pytest.mark.slow
def test_thirty_two_sampler_settings_share_one_model(model_dir, monkeypatch, tmp_path):
    alive, loaded = weakref.WeakSet(), []
    load = answering.load_model

    def counted(*args, **options):
        model, processor = load(*args, **options)
        alive.add(model)
        loaded.append(len(alive))
        return model, processor

    monkeypatch.setattr(answering, "load_model", counted)
    configs = {f"{z} {seed}": SamplerConfig(8, 8, z, temperature=0.5, seed=seed) for z in (1, 2, 4, 8) for seed in range(8)}
    items = ask_model(Answerer.load(model_dir), configs, {0: tiny.examples(2)}, tmp_path)
    gc.collect()
    assert items["setting"].nunique() == 32 and loaded == [1] and len(alive) == 0


def test_the_dtype_is_the_one_asked_for_and_is_told(model_dir, tmp_path):
    answerer = Answerer.load(model_dir, dtype="bfloat16", device="cpu")
    assert answerer.model.dtype == torch.bfloat16
    answer_file(tiny.examples(2), answerer, BASE, tmp_path / "a.jsonl", quiet=True)
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["settings"]["dtype"] == "bfloat16"


# The command line.


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return tiny.question_folder(tmp_path_factory.mktemp("questions"), 3)


def ways(questions, model_dir, out):
    """The same options for both commands."""
    ask = ["ask", questions / "0.png", tiny.QUESTIONS[0], "--model", model_dir, "--json"]
    where = ["--questions", questions / "questions.jsonl", "--images", questions, "--model", model_dir, "--out", out]
    return ask, ["generate", *where, "--batch-size", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--cache", "dual"),
        ("--cache", "prefix", "--schedule", "cosine"),
        ("--schedule", "entropy", "--device", "cpu"),
        ("--preset", "official"),
        ("--no-cuda-graphs",),
    ],
)
def test_ask_and_generate_take_the_same_options_and_answer_alike(questions, model_dir, tmp_path, options):
    ask, generate = ways(questions, model_dir, tmp_path / "answers.jsonl")
    asked, generated = run(*ask, *options), run(*generate, *options)
    assert asked.exit_code == 0 and generated.exit_code == 0, asked.output + generated.output
    answer, row = json.loads(asked.stdout), json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
    assert answer["text"] == row["text"] and answer["forwards"] == row["forwards"]
    spec = get_profile("tiny").describe
    told = row["settings"]
    assert (told["gen_length"], told["block_length"], told["steps"]) == (spec.gen_length, spec.block_length, spec.steps)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--device", "cuda:7"), "no device cuda:7"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--device", "meta"), "unknown device 'meta'"),
        (("--cuda-graphs", "--device", "cpu"), "CUDA graphs need"),
        (("--preset", "official", "--cache", "dual"), "the preset 'official' has no schedule"),
        (("--preset", "mine"), "unknown preset 'mine'"),
    ],
)
def test_what_cannot_be_is_one_sentence_in_both(questions, model_dir, tmp_path, options, word):
    for command in ways(questions, model_dir, tmp_path / "answers.jsonl"):
        done = run(*command, *options)
        last = done.stderr.strip().splitlines()[-1]
        assert done.exit_code == 2 and last.startswith("medv: ") and word in last, done.output
    assert not (tmp_path / "answers.jsonl").exists()


def test_the_official_preset_ends_where_the_model_ends_its_turn(model_dir):
    from medv.evaluation.answering import with_stop

    config = with_stop(SamplerConfig.official(gen_length=8, block_length=8, steps=8), tiny.processor())
    assert config.stop_sequences == ((tiny.special().end_of_turn,),)
    assert with_stop(BASE, tiny.processor()) is BASE
