"""What a recipe prints before it starts is the arithmetic of its sizes, and what cannot fit is refused with it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from command import run
from tiny import examples, model, processor, special

from medv.checkpoints.assembly import shape_config
from medv.model.modeling import MedVForMaskedDiffusion
from medv.profiles import PROFILES, get_profile
from medv.training.costs import RESERVE, check_memory, plan_stage
from medv.training.lora import LoraRecipe, attach_lora, freeze_except
from medv.training.stages import plan_run

PAPER = get_profile("paper")
CONFIG = shape_config(PAPER.model, special())
LANGUAGE, PROJECTOR = 8_015_581_184, 1152 * 4096 + 4096 + 4096 * 4096 + 4096
V, D, MLP, LAYERS, LENGTH = 126464, 4096, 12288, 32, 8192


def vision_size() -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MedVForMaskedDiffusion(CONFIG).model.vision_tower.parameters())


@pytest.mark.slow
def test_the_plan_of_the_papers_full_fine_tuning_is_its_arithmetic():
    plan = plan_stage(CONFIG, PAPER.stages["vqa"], gpus=4, zero=3, capacity=80e9)
    total, trainable = LANGUAGE + PROJECTOR + vision_size(), LANGUAGE + PROJECTOR
    assert plan.trainable == trainable and plan.micro_batch == 2 and plan.length == LENGTH
    assert plan.parts["weights"] == 2 * total / 4 + 2 * 2 * V * D
    assert plan.parts["gradients"] == 2 * trainable / 4 and plan.parts["optimizer"] == 12 * trainable / 4
    tokens = 2 * LENGTH
    assert plan.parts["activations"] == 2 * tokens * (D * LAYERS + 11 * D + 4 * MLP)
    assert plan.parts["logits"] == 2 * (1024 * V + V * D)
    assert plan.total == sum(plan.parts.values()) and plan.parts["reserve"] == RESERVE and plan.fits


def test_the_plan_of_the_papers_alignment_holds_states_of_the_projector_alone():
    plan = plan_stage(CONFIG, PAPER.stages["align"], gpus=4, zero=2)
    assert plan.trainable == PROJECTOR and plan.micro_batch == 8
    assert plan.parts["weights"] == 2 * (LANGUAGE + PROJECTOR + vision_size())
    assert plan.parts["gradients"] == 2 * PROJECTOR / 4 and plan.parts["optimizer"] == 12 * PROJECTOR / 4
    assert plan.parts["logits"] == 2 * 1024 * V, "a frozen head has no gradient"


def test_each_zero_stage_cuts_one_thing_more():
    zeros = range(4)
    none, one, two, three = (plan_stage(CONFIG, PAPER.stages["vqa"], gpus=8, zero=zero).parts for zero in zeros)
    assert none["optimizer"] + none["gradients"] + none["weights"] > 16 * LANGUAGE
    assert one["gradients"] == 8 * two["gradients"] and one["optimizer"] == two["optimizer"] == three["optimizer"]
    assert one["weights"] == two["weights"] > 3 * three["weights"]


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_the_arithmetic_and_a_mend():
    options = {"zero": 3, "capacity": 80e9}
    with pytest.raises(
        ValueError, match=r"weights .* \+ gradients .* = \d+\.\d+ GB .* there are 80\.00 GB; with ZeRO-3 on 2|4"
    ):
        check_memory(CONFIG, PAPER.stages["vqa"], gpus=1, **options)
    wasteful = replace(PAPER.stages["vqa"], checkpointing=False)
    with pytest.raises(ValueError, match="with --checkpointing it fits"):
        check_memory(CONFIG, wasteful, gpus=4, **options)
    assert check_memory(CONFIG, PAPER.stages["vqa"], gpus=4, **options).fits


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("capacity", [20e9, 60e9, 80e9, 120e9, 160e9])
def test_what_a_refusal_advises_are_options_of_the_training_that_change_something(checkpointing, capacity):
    known = run("train", "vqa", "--help").stdout
    recipe = replace(PAPER.stages["vqa"], checkpointing=checkpointing)
    with pytest.raises(ValueError, match="this cannot fit") as error:
        check_memory(CONFIG, recipe, gpus=1, capacity=capacity)
    advice = str(error.value).rpartition("; ")[2]
    assert all(option in known for option in re.findall(r"--[a-z-]+", advice)) and "recipe" not in advice
    assert "--checkpointing" not in advice or not checkpointing


def test_adapters_are_counted_as_they_are():
    network = model()
    recipe = replace(PAPER.stages["vqa"], max_length=100)
    plan = plan_stage(network.config, recipe, lora=LoraRecipe(rank=4))
    freeze_except(network, recipe.trains)
    adapted = attach_lora(network, LoraRecipe(rank=4))
    assert plan.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_plan_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="there is no ZeRO-4"):
        plan_stage(CONFIG, PAPER.stages["vqa"], zero=4)
    with pytest.raises(ValueError, match="batch of 8 cannot be cut into 3 devices"):
        plan_stage(CONFIG, PAPER.stages["vqa"], gpus=3)


def test_the_plan_of_a_run_looks_at_its_longest_example():
    recipe = replace(get_profile("tiny").stages["vqa"], batch_size=8)
    plan = plan_run(model(), processor(), recipe, examples(8))
    assert 20 < plan.length < 100 and plan.micro_batch == 8 and plan.fits


@pytest.mark.slow
def test_the_command_prints_the_plan_and_ends_with_2_where_it_cannot_fit():
    fits = ["plan", "vqa", "--gpus", "4", "--zero", "3", "--gpu-memory", "80"]
    done = run(*fits, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["fits"]
    assert "optimizer" in run(*fits).stdout
    assert run("plan", "vqa", "--gpu-memory", "80").exit_code == 2


def test_disk_and_hours_are_the_arithmetic_of_the_recipe():
    cost = plan_stage(CONFIG, PAPER.stages["instruct"], gpus=4, zero=3, views=5)
    total, trainable = LANGUAGE + PROJECTOR + vision_size(), LANGUAGE + PROJECTOR
    assert cost.examples == 4 * 60_000 and cost.tokens == 5 * 27**2 + 250
    assert cost.result == 2 * total and cost.checkpoint == 2 * total + 12 * trainable + 2 * (total - trainable)
    assert cost.disk == 2 * cost.checkpoint and 113e9 < cost.checkpoint < 115e9
    assert cost.seconds > 6 * 0.93 * LANGUAGE * cost.examples * cost.tokens / (4 * 0.4 * 312e12)
    assert plan_stage(CONFIG, PAPER.stages["instruct"], gpus=8, zero=3, views=5).seconds == cost.seconds / 2
    projector = plan_stage(CONFIG, PAPER.stages["align"], gpus=4, zero=3, views=5)
    assert projector.result == 2 * PROJECTOR and projector.examples == 1_200_000
    with pytest.raises(ValueError, match="'abacus' is not known: use one of B200"):
        plan_stage(CONFIG, PAPER.stages["align"], card="abacus")


@pytest.mark.parametrize(("data", "examples"), [("vqa_rad", 2 * 1797), ("slake", 49_190), ("pathvqa", 138_285)])
def test_the_command_knows_the_data_sets_and_tells_disk_and_hours_with_what_is_assumed(data, examples):
    command = ["plan", "vqa", "--data", data, "--gpus", "4", "--zero", "3"]
    told = json.loads(run(*command, "--json").stdout)
    assert examples <= told["examples"] < examples + 8 and told["hours"] > 0 and told["disk"] > told["total"]
    said = " ".join(run(*command, "--card", "H100", "--mfu", "0.3").stdout.split())
    assert "reach 30% of the peak of 4 x H100" in said and "GB of disk" in said


# The paper's recipe says where each value comes from.


@pytest.mark.parametrize("stage", PAPER.stages)
def test_every_value_of_the_papers_recipe_has_a_source(stage):
    recipe = PAPER.stages[stage]
    named = set(recipe.__dataclass_fields__) - {"sources"}
    assert set(recipe.sources) == named and all(recipe.sources.values())
    assert "not confirmed" in recipe.sources["learning_rate"]
    assert "Table 6" in recipe.sources["batch_size"]


def test_every_recipe_says_where_it_comes_from():
    assert all(recipe.sources for profile in PROFILES.values() for recipe in profile.stages.values())
