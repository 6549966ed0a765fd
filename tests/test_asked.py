"""How a model is asked is a parameter of every notebook that generates: how many at once, and by whose sampler."""

import json

import pytest
import tiny

from medv.artifacts import read_jsonl
from medv.checkpoints.bundled import bundled
from medv.companion.reproduction.cache import code_cells, parameter_names
from medv.companion.reproduction.registry import all_nodes
from medv.companion.reproduction.run import open_run
from medv.companion.studies import conversation, generation, lengths
from medv.companion.studies.vqa_study import sampler_config
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.phantoms.sets import description_set
from medv.profiles import SamplerSpec, get_profile

OFFICIAL = get_profile("smoke").asked(batch_size=3, preset="official")
GENERATING = ("10", "11", "12", "20", "21", "30", "31", "32", "33")


@pytest.mark.parametrize("number", GENERATING)
def test_a_notebook_that_generates_takes_a_batch_size_and_a_preset_and_passes_them_on(number, root):
    (path,) = (root / "notebooks").glob(f"{number}*.ipynb")
    assert {"batch_size", "preset"} <= set(parameter_names(path))
    setup = "".join(json.loads(path.read_text())["cells"][2]["source"])
    assert "asking" in setup.partition("open_run(")[2]


def test_a_run_is_asked_as_its_parameters_say_and_refuses_what_cannot_be(tmp_path):
    opened = open_run("stage2", profile="smoke", out=tmp_path, parameters={"batch_size": 3, "preset": "official"})
    assert opened.profile == OFFICIAL and {"batch_size": 3, "preset": "official"}.items() <= opened.parameters.items()
    plain = open_run("stage2", profile="smoke", out=tmp_path, parameters={"batch_size": None, "preset": "medv"})
    assert plain.profile == get_profile("smoke")
    for wrong, words in (
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "3"}, "batch_size"),
        ({"preset": "x"}, "medv, official"),
    ):
        with pytest.raises(ValueError, match=words):
            open_run("stage2", profile="smoke", out=tmp_path, parameters=wrong)


def test_the_defaults_of_every_notebook_open_its_run(root, tmp_path):
    for node in all_nodes():
        (cell,) = [c for c in code_cells(root / "notebooks" / node.notebook) if "parameters" in c["metadata"].get("tags", ())]
        own = {}
        exec(cell["source"], own)  # assignments of constants alone
        own = {name: own[name] for name in parameter_names(root / "notebooks" / node.notebook)}
        named = {name: own.pop(name) for name in ("profile", "seed", "out")}
        open_run(node.name, **named | {"profile": "smoke", "out": tmp_path}, parameters=own)


def test_every_study_asks_the_diffusion_model_by_the_preset_and_the_twin_by_its_own():
    settings = generation.table5_settings(OFFICIAL)
    configs = list(generation.plain_configs(settings, OFFICIAL.describe).values())
    ways = lengths.table3_ways(OFFICIAL, "model", "twin") | lengths.length_ways(OFFICIAL, "model", "twin")
    assert all((model == "twin") == name.startswith(lengths.TWIN) for name, (model, _) in ways.items())
    configs += [config for name, (_, config) in ways.items() if name.startswith(lengths.DIFFUSION)]
    plan = OFFICIAL.initialization
    configs += [sampler_config(spec) for spec in (plan.describe, plan.answer, OFFICIAL.answer)]
    assert {config.preset for config in configs} == {"official"}
    assert {config.preset for name, (_, config) in ways.items() if name.startswith(lengths.TWIN)} == {"medv"}
    assert plan.describe.batch_size == 3 and plan.describe.gen_length == get_profile("smoke").initialization.describe.gen_length


def test_the_official_sampler_answers_in_any_batch_alike_and_stops_at_the_end_of_a_turn():
    asked, config = description_set("test", 3), sampler_config(SamplerSpec(8, 4, 4, preset="official"))
    assert config == SamplerConfig.official(gen_length=8, block_length=4, steps=4)
    answerer = Answerer(tiny.model(), tiny.processor())
    texts = [[a.text for a in answerer.answer(asked, config, batch_size=n, quiet=True)] for n in (1, 2)]
    assert texts[0] == texts[1]


def test_the_answers_of_a_conversation_say_that_the_official_sampler_wrote_them(tmp_path):
    asked = conversation.questions(OFFICIAL)[-2:]
    conversation.answer_all(OFFICIAL, {"a model": (bundled("tiny_model"), False)}, asked, tmp_path)
    rows = [row for file in tmp_path.glob("*.jsonl") for row in read_jsonl(file)]
    assert len(rows) == 2 and {row["settings"]["preset"] for row in rows} == {"official"}
