"""A miniature of the paper's world: weights under the names of the releases, data in the published formats, a configuration.

`python tests/paper_world.py FOLDER --kills 2` makes all twenty exhibits of it. Widths, depths and images are tiny; the
vocabulary, the special ids and every file format are the real ones. Where the real annotations are at hand (MEDV_DATA), some of
their rows are taken, with placeholder images.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from stub_judge import StubJudge
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel
from typer.testing import CliRunner

from medv.checkpoints.assembly import assemble, new_processor
from medv.checkpoints.loading import load_tokenizer
from medv.checkpoints.released import image_settings
from medv.cli import app
from medv.companion.reproduction.registry import EXHIBITS
from medv.intervals import NOT_MEASURED

DRAWN = {"phantoms", "loss_weights", "table8", "audit_gaming", "pointing"}  # about phantoms, and counts beside the real sets
ANYWHERE = {"corruption", "table6", "table7", "table8", "audit"}  # the same at every profile: formulas, recipes, counts
DATA = Path(os.environ.get("MEDV_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
ROWS, WIDTH, LAYERS = 126_464, 32, 2
SPECIAL = {
    "<|startoftext|>": 126_080,
    "<|endoftext|>": 126_081,
    "<|mdm_mask|>": 126_336,
    "<|start_header_id|>": 126_346,
    "<|end_header_id|>": 126_347,
    "<|eot_id|>": 126_348,
}
IMAGES = {
    "image_aspect_ratio": "anyres_max_4",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": "(1x1),...,(1x2)",
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """LLaDA's 126,349 ids: bytes, words that nobody uses, the special tokens where they belong."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    taken = {number: string for string, number in SPECIAL.items()}
    for number in range(len(alphabet), max(taken) + 1):
        vocabulary[taken.get(number, f"<unused_{number}>")] = number
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(string, special=True) for string in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def write_llada(folder):
    """A LLaDA-8B checkpoint under its OLMo names."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (WIDTH, WIDTH))
    shapes = square | {"ff_proj": (64, WIDTH), "up_proj": (64, WIDTH), "ff_out": (WIDTH, 64)}
    tensors = {"wte": (ROWS, WIDTH), "ff_out": (ROWS, WIDTH)}
    tensors |= {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    weights = {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in tensors.items()}
    norms = ("ln_f", *(f"blocks.{i}.{name}" for i in range(LAYERS) for name in ("attn_norm", "ff_norm")))
    weights |= {name: torch.ones(WIDTH) for name in norms}
    save_file({f"model.transformer.{k}.weight": v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors")
    config = {"d_model": WIDTH, "mlp_hidden_size": 64, "n_layers": LAYERS, "n_heads": 4, "rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS, "bos_token_id": 128000}))
    tokenizer().save_pretrained(folder)


def write_siglip(folder, size=384):
    """A SigLIP2 release with its text tower, all layers and head."""
    vision = {"image_size": size, "patch_size": 14, "hidden_size": WIDTH, "intermediate_size": 48}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(1)
    SiglipModel(SiglipConfig(vision_config=vision | heads, text_config=text)).save_pretrained(folder)


def medv(*arguments) -> str:
    """The output of a command of medv."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def placeholder(path):
    """A small picture of noise that depends on its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(list(path.name.encode()))
    width, height = draw.integers(40, 90, 2)
    Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path, "JPEG")


def cut(source, target, count, key="image", keep=lambda row: True):
    """Every n-th row of an annotation file, with a placeholder for each image that they name."""
    text = source.read_text(encoding="utf-8")
    rows = json.loads(text) if source.suffix == ".json" else map(json.loads, text.splitlines())
    rows = list(filter(keep, rows))
    rows = rows[:: max(1, len(rows) // count)][:count]
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(rows) if target.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    target.write_text(lines, encoding="utf-8")
    for row in rows:
        placeholder(target.parent / "images" / row[key])
    return rows


def write_weights(root, size=56):
    """LLaDA-8B, SigLIP2 and LLaDA-V as released, and what `medv convert` makes of them."""
    (root / "released").mkdir(parents=True)
    write_llada(root / "released" / "LLaDA-8B-Instruct")
    write_siglip(root / "released" / "siglip2", size)
    medv("convert", root / "released/LLaDA-8B-Instruct", root / "language")
    medv("convert", root / "released/siglip2", root / "vision")
    model = assemble(root / "language", root / "vision", seed=5, **image_settings(IMAGES, size))
    model.save_pretrained(root / "assembled")
    new_processor(load_tokenizer(root / "language"), model.config).save_pretrained(root / "assembled")
    medv("convert", root / "assembled", root / "released" / "LLaDA-V", "--to", "lladav")
    medv("convert", root / "released/LLaDA-V", root / "general", "--vision", root / "released/siglip2")


def write_data(root, train=24, test=12):
    """Some rows of each data set, in a folder of its own."""
    english = lambda row: row["q_lang"] == "en"  # noqa: E731
    own = lambda row: row["phrase_type"] in ("freeform", "para", "test_freeform", "test_para")  # noqa: E731
    cut(DATA / "pathvqa/val.jsonl", root / "pathvqa/val.jsonl", test)
    for split, count in (("train", train), ("test", test)):
        cut(DATA / f"vqa_rad/{split}set.json", root / f"vqa_rad/{split}set.json", count, "image_name", own)
        cut(DATA / f"slake/{split}.json", root / f"slake/{split}.json", count, "img_name", english)
        cut(DATA / f"pathvqa/{split}.jsonl", root / f"pathvqa/{split}.jsonl", count)
    for name in ("llava_med_eval_qa50_qa.jsonl",):
        rows = cut(DATA / "qa50" / name, root / "qa50" / name, 193)
    talks = [
        {"id": str(n), "image": f"{n}.jpg", "conversations": [{"from": who, "value": text} for who, text in said]}
        for n, said in enumerate(
            [("human", "What is shown?\n<image>"), ("gpt", row["fig_caption"])] for row in rows[: train // 2]
        )
    ]
    for name, file in (("align", "llava_med_alignment_500k.json"), ("instruct", "llava_med_instruct_60k.json")):
        (root / name / "images").mkdir(parents=True)
        (root / name / file).write_text(json.dumps(talks))
        for talk in talks:
            placeholder(root / name / "images" / talk["image"])
    answers = [{"question_id": row["question_id"], "text": row["gpt4_answer"], "seconds": 1.5} for row in rows]
    (root / "llava_med.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))


CONFIG = """
[weights]
language = "language"
vision = "vision"
general = "general"

[data]
align = "align"
instruct = "instruct"
vqa_rad = "vqa_rad"
slake = "slake"
pathvqa = "pathvqa"
qa50 = "qa50"

[baselines.LLaVA-Med]
answers = "llava_med.jsonl"

[judge]
base_url = "{judge}"
model = "stub"
attempts = 2
delay = 0.01

[machine]
processes = {processes}

[profile]
dtype = "float32"
evaluation_descriptions = 6
describe = {{gen_length = 16, block_length = 4, steps = 16, batch_size = 8}}
answer = {{gen_length = 4, block_length = 4, steps = 4}}
caption = {{gen_length = 8, block_length = 8, steps = 4}}
sentence = {{gen_length = 8, block_length = 8, steps = 4}}
draws = 2
lora = {{sizes = [4, 8], steps = [1, 2], rates = {{0 = 1e-4, 2 = 1e-3}}, seeds = [0], questions = 6}}

[profile.stages]
align = {{batch_size = 4, epochs = 0.5}}
instruct = {{batch_size = 4, epochs = 0.5}}
vqa = {{batch_size = 4, epochs = 0.5}}

[profile.vqa_sets]
slake = {{batch_size = 4, epochs = 0.5}}
pathvqa = {{batch_size = 4, epochs = 0.5}}

[profile.initialization]
descriptions = 4

[profile.fast]
oracle = {{gen_length = 16, block_length = 8, steps = 16}}
texts = 8
descriptions = 4
cached = 2
bench = {{hidden_size = 16, intermediate_size = 32, layers = 1, heads = 2, gen_length = 8, block_length = 4, vocab_size = 1000}}
"""


def write_config(root, judge="http://127.0.0.1:9/v1", processes=1):
    """The configuration file of the world."""
    (root / "paper.toml").write_text(CONFIG.format(judge=judge, processes=processes))
    return root / "paper.toml"


def judged(name, number):
    """A stub judge's reply: the reference has 8, the candidate a score that depends on the question alone."""
    return f"8 {1 + len(name) % 9}\nThe scores of a stub."


class WorldJudge(StubJudge):
    """A stub judge whose score depends on the question and the answer, so that rows of other answers differ."""

    def answer(self, request):
        content = json.loads(request.rfile.read(int(request.headers["Content-Length"])))["messages"][1]["content"]
        said = content.partition("[Assistant 2]")[2].partition("[End of Assistant 2]")[0]
        self.behave(request, judged(content.partition("[Question]")[2].partition("[Assistant 1]")[0] + said, 0))


def exhibits(out):
    """What each of the paper's tables and figures in a run says of itself: name -> `about` of its manifest."""
    files = {name: out / "figures" / f"{name}.json" for name in EXHIBITS}
    return {name: json.loads(file.read_text())["about"] for name, file in files.items() if file.exists()}


def check_labels(out):
    """Every result of a run says what it was made of, nothing drawn is called real, and what has no number has a gap."""
    for file in sorted((out / "figures").glob("*.json")):
        about, frame = json.loads(file.read_text())["about"], pd.read_csv(file.with_suffix(".csv"))
        assert ("phantoms" in about["data"]) == (file.stem in DRAWN), f"{file.stem}: {about['data']}"
        if file.stem in EXHIBITS and not about["comparable"]:
            assert about["data"].startswith("real "), f"{file.stem}: {about['data']}"
        assert not about["comparable"] or file.stem in ANYWHERE, f"{file.stem} compares with the paper"
        empty = [column for column in frame if len(frame) and frame[column].isna().all()]
        assert all(any(column in gap for gap in about["gaps"]) for column in empty), f"{file.stem}: {empty} {about['gaps']}"
        if {"verdict", "n"} <= set(frame):
            assert set(frame.loc[frame["n"] == 0, "verdict"]) <= {NOT_MEASURED}, file.stem


def reproduce(root, out, *options, config=None, kill_after=None):
    """The exit code of `medv reproduce` of the world in a process of its own, killed with its kernels after so many seconds."""
    command = [sys.executable, "-m", "medv", "reproduce", "--profile", "paper", "--out", str(out), *options]
    command += ["--config", str(config or root / "paper.toml")]
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"MEDV_JUDGE_KEY": "stub"})
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def main():
    """Make the world and all twenty exhibits of it, killed on the way as often as asked: exit code 0 if all are there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="processes of each training")
    parser.add_argument("--kills", type=int, default=0, help="kill -9 so many times on the way")
    parser.add_argument("--every", type=float, default=120, help="seconds between kills")
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    root, started = given.folder, time.monotonic()
    if not (DATA / "qa50").is_dir():
        print(f"skipped: there are no annotations at {DATA}; set MEDV_DATA to their folder")
        return 0
    if not (root / "general").exists():
        write_weights(root)
        write_data(root)
    with WorldJudge(judged) as judge:
        write_config(root, judge.url, given.processes)
        options = [part for name in given.only for part in ("--only", name)]
        for _ in range(given.kills):
            code = reproduce(root, root / "run", *options, kill_after=given.every)
            print(f"killed, exit code {code}; {len(exhibits(root / 'run'))} exhibits", flush=True)
        code = reproduce(root, root / "run", *options)
    check_labels(root / "run")
    found = exhibits(root / "run")
    for name, about in found.items():
        print(f"{name}: {about['data']}" + "".join(f"; {gap}" for gap in about["gaps"]))
    print(f"{len(found)} of {len(EXHIBITS)} exhibits in {(time.monotonic() - started) / 60:.1f} min, exit code {code}")
    return code or (not given.only and len(found) < len(EXHIBITS))


if __name__ == "__main__":
    sys.exit(main())
