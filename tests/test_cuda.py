"""What only a CUDA device can show: the same tokens as on the CPU, graphs that change nothing, a step of training there."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from command import run

from medv.companion.figures.lessons import loss_noise
from medv.companion.studies.sizes import reach
from medv.companion.towers.adapt import AdaptRecipe, adapt
from medv.companion.towers.text import Writing, write_text_of
from medv.diffusion.caching import DualCache, NoCache, PrefixCache
from medv.diffusion.config import SamplerConfig
from medv.diffusion.loss import full_cross_entropy, masked_cross_entropy
from medv.diffusion.schedules import EntropyBoundSchedule, FixedSchedule, ThresholdSchedule
from medv.evaluation.answering import Answerer
from medv.evaluation.benchmark import answer_file
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.twin import language_tower
from medv.profiles import StageRecipe
from medv.training.launch import RunOptions
from medv.training.stages import train_stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BASE = SamplerConfig(gen_length=24, block_length=8, steps=24, min_length=16)
CACHES = (PrefixCache(4), DualCache(4), DualCache(4, vicinity=(3, 3)))


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Float32 products in float32: tf32 would change tokens."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def pair() -> tuple[MedVForMaskedDiffusion, MedVForMaskedDiffusion]:
    """The tiny float32 model on the CPU and on the GPU."""
    return tiny.model(), tiny.model().cuda()


def prompts(rows: list[int], *, images: bool = True):
    """Ragged prompts of these questions."""
    pictures = [tiny.picture(row) for row in rows] if images else None
    return tiny.processor()(images=pictures, text=[tiny.QUESTIONS[row % 4] for row in rows])


def told(output) -> list[tuple]:
    """What was written where and when."""
    return [commit[:4] for commit in output.trace.commits]


def same(one, other) -> bool:
    """Equal sequences, order, ends and counts."""
    assert one.sequences.cpu().equal(other.sequences.cpu())
    assert told(one) == told(other)
    return (one.lengths, one.forwards, one.finish_reason) == (other.lengths, other.forwards, other.finish_reason)


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]])
@pytest.mark.parametrize(
    "config",
    [
        BASE,
        replace(BASE, steps=6, cfg_scale=1.5),
        replace(BASE, temperature=0.8, seed=3),
        replace(BASE, schedule=FixedSchedule("cosine")),
        replace(BASE, schedule=ThresholdSchedule(0.5)),
        replace(BASE, schedule=EntropyBoundSchedule(1.0)),
        replace(BASE, cache=DualCache(1)),
    ],
)
def test_the_exact_sampler_writes_the_tokens_of_the_cpu(pair, rows, config):
    inputs = prompts(rows)
    expected = pair[0].generate(**inputs, config=config)
    assert same(pair[1].generate(**inputs.to("cuda"), config=config), expected)


@pytest.mark.parametrize("cache", [NoCache(), *CACHES])
@pytest.mark.parametrize(("rows", "cfg_scale"), [([0], 0.0), ([0, 1, 2, 3], 1.0)])
def test_graphs_write_the_same_tokens_and_so_do_those_of_an_earlier_call(pair, cache, rows, cfg_scale):
    config = replace(BASE, cache=cache, cfg_scale=cfg_scale)
    for asked in (rows, [row + 4 for row in rows], rows[::-1]):  # prompts of one shape, other pictures, other padding
        inputs = prompts(asked)
        expected = pair[0].generate(**inputs, config=config)
        inputs = inputs.to("cuda")
        assert same(pair[1].generate(**inputs, config=config, graphs=True), expected)
        assert same(pair[1].generate(**inputs, config=config), expected)


@pytest.mark.parametrize("cache", [NoCache(), *CACHES])
@pytest.mark.parametrize("images", [False, True])
def test_compiled_pieces_write_the_same_tokens(pair, cache, images):
    inputs, config = prompts([0, 1, 2], images=images).to("cuda"), replace(BASE, cache=cache)
    eager = pair[1].generate(**inputs, config=config)
    bare = pair[1].generate(**inputs, config=replace(config, min_length=0))  # without an early stop its path is another
    assert same(pair[1].generate(**inputs, config=config, compiled=True), eager)
    assert same(pair[1].generate(**inputs, config=replace(config, min_length=0), graphs=True, compiled=True), bare)


def test_rows_that_end_early_leave_a_graphed_batch(pair):
    config = replace(BASE, cache=DualCache(4), min_length=0)
    written = pair[1].generate(**prompts([0, 1, 2, 3]).to("cuda"), config=replace(config, stop_tokens=())).sequences
    stop = int(written[0, 3])
    config = replace(config, stop_tokens=(stop,))
    eager = pair[1].generate(**prompts([0, 1, 2, 3]).to("cuda"), config=config)
    graphed = pair[1].generate(**prompts([0, 1, 2, 3]).to("cuda"), config=config, graphs=True)
    assert graphed.sequences.equal(eager.sequences) and graphed.lengths == eager.lengths
    assert "stop" in graphed.finish_reason


def test_graphs_are_made_anew_where_the_weights_have_moved():
    network, config = tiny.model().cuda(), replace(BASE, cache=DualCache(4))
    inputs = prompts([0, 1]).to("cuda")
    first = network.generate(**inputs, config=config, graphs=True)
    network.cpu()
    with torch.no_grad():
        network.lm_head.weight.mul_(-1)
    network.cuda()
    second = network.generate(**inputs, config=config, graphs=True)
    assert not second.sequences.equal(first.sequences)
    assert same(second, network.generate(**inputs, config=config))


def test_a_stream_left_in_the_middle_spoils_no_later_call(pair):
    inputs, config = prompts([0, 1]).to("cuda"), replace(BASE, cache=DualCache(4))
    expected = pair[1].generate(**inputs, config=config)
    steps = pair[1].stream(**inputs, config=config, graphs=True)
    for _ in range(5):
        next(steps)
    assert same(pair[1].generate(**inputs, config=config, graphs=True), expected), "while another one waits"
    steps.close()
    assert same(pair[1].generate(**inputs, config=config, graphs=True), expected)


def test_bfloat16_is_near_float32_and_its_graphs_repeat_themselves(pair):
    inputs = prompts([0, 1]).to("cuda")
    half = tiny.model().to("cuda", torch.bfloat16)
    canvas = inputs["input_ids"]
    given = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.inference_mode():
        full, rough = (network(canvas, **given).logits.float() for network in (pair[1], half))
    seen = given["attention_mask"].bool()
    error = (rough - full)[seen].norm() / full[seen].norm()
    assert error < 0.05
    config = replace(BASE, cache=DualCache(4))
    one, other = (half.generate(**inputs, config=config, graphs=True, compiled=True) for _ in range(2))
    assert same(one, other)


def test_a_fixed_schedule_never_makes_the_host_wait_between_its_steps(pair):
    inputs = prompts([0, 1], images=False).to("cuda")
    for cache in (NoCache(), DualCache(4)):
        config = SamplerConfig(16, 8, 16, cache=cache, stop_tokens=())
        steps = pair[1].stream(**inputs, config=config, tell=False)
        next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(14):
                next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def loss_and_gradients(device: str, dtype: torch.dtype, loss) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 700, 32, generator=generator).to(device, dtype).requires_grad_()
    head = torch.nn.Linear(32, 5000, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(5000, 32, generator=generator) / 6)
    labels = torch.randint(5000, (2, 700), generator=generator).to(device)
    masked = (torch.rand(2, 700, generator=generator) < 0.9).to(device)
    weights = torch.rand(int(masked.sum()), generator=generator).to(device)
    value = loss(states, head, labels, masked, weights)
    return [part.detach().float().cpu() for part in (value, *torch.autograd.grad(value, [states, head.weight]))]


def ours(states, head, labels, masked, weights):
    return masked_cross_entropy(states[masked], head, labels[masked], weights)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_the_cpu_and_of_full_logits(dtype, tolerance):
    expected = loss_and_gradients("cpu", torch.float32, full_cross_entropy)
    for found, wanted in zip(loss_and_gradients("cuda", dtype, ours), expected, strict=True):
        assert (found - wanted).norm() / wanted.norm() < tolerance


def test_the_models_loss_is_that_of_the_cpu(pair):
    ids = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone(), "t": torch.full((2,), 0.5), "u": torch.rand(2, 40)}
    losses = [network(**{k: v.to(network.device) for k, v in batch.items()}).loss.item() for network in pair]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_training_takes_a_step_there_and_stays_near_the_cpu(tmp_path):
    recipe = StageRecipe(("projector", "language_model"), 0, 1, 8, 1e-3, max_length=100, padding="none")
    network = tiny.model()
    train_stage(network, tiny.processor(), recipe, tiny.examples(8), tmp_path / "out", RunOptions(quiet=True))
    assert all(value.is_cuda and value.isfinite().all() for value in network.parameters())
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["steps"] == 1


def test_what_lessons_look_at_is_the_same_there(pair):
    ids = torch.tensor(tiny.tokenizer()("What is shown?")["input_ids"])
    assert (reach(pair[1], ids) == reach(pair[0], ids)).all()
    losses = [loss_noise(network, tiny.processor(), tiny.examples(2), draws=2)["loss"] for network in pair]
    assert losses[1].tolist() == pytest.approx(losses[0].tolist(), rel=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder, and a folder of questions with their images."""
    model, questions = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("questions")
    tiny.model().save_pretrained(model)
    tiny.processor().save_pretrained(model)
    rows = []
    for number, example in enumerate(tiny.examples(5)):
        example.image().save(questions / f"{number}.png")
        rows.append(json.dumps({"question_id": f"q{number}", "image": f"{number}.png", "text": example.question}))
    (questions / "questions.jsonl").write_text("\n".join(rows) + "\n")
    return model, questions


def test_the_command_answers_on_the_gpu_what_the_cpu_answers(folders, tmp_path):
    model, questions = folders
    sizes = ["--gen-length", "8", "--block-length", "8", "--steps", "8", "--batch-size", "2"]
    texts = []
    for device in ("cuda", "cpu"):
        out = tmp_path / f"{device}.jsonl"
        where = ["--questions", questions / "questions.jsonl", "--images", questions, "--model", model, "--out", out]
        before = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
        done = run("generate", *map(str, where), *sizes, "--device", device)
        assert done.exit_code == 0, done.output
        used = torch.cuda.memory_stats().get("allocation.all.allocated", 0) - before
        assert bool(used) == (device == "cuda")
        texts.append([json.loads(line)["text"] for line in out.open()])
    assert texts[0] == texts[1]


def test_many_settings_take_no_more_memory_than_one(folders, tmp_path):
    answerer = Answerer.load(folders[0], device="cuda")
    held = []
    for steps in (8, 4, 2, 1):
        config = SamplerConfig(8, 8, steps, cache=DualCache(2))
        answer_file(tiny.examples(4), answerer, config, tmp_path / f"{steps}.jsonl", batch_size=2, quiet=True)
        held.append(torch.cuda.memory_allocated())
    assert max(held[1:]) <= held[0] + 2**20


def test_a_tower_writes_and_is_adapted_on_the_gpu_and_goes_on_there(tmp_path):
    tower = language_tower(tiny.model())
    tower.config.is_causal = True
    tower.save_pretrained(tmp_path / "tower")
    tiny.tokenizer().save_pretrained(tmp_path / "tower")
    written = write_text_of(tmp_path / "tower", tmp_path / "text", 60, Writing(8, 16), device="cuda", quiet=True)
    assert written["tokens"] >= 60
    rows = torch.randint(20, 250, (12, 32), generator=torch.Generator().manual_seed(0))
    recipe = AdaptRecipe(tokens=20 * 8 * 32, length=32, batch_size=8, learning_rate=3e-3)
    given = (tmp_path / "tower", rows[:10], rows[10:], recipe, tmp_path / "out")
    assert adapt(*given, device="cuda", stop_after=10, quiet=True) == {}
    facts = adapt(*given, device="cuda", quiet=True)
    assert facts["eval_loss"] < facts["eval_loss_before"]
