"""Presets in configs/training: each loads, and says of its memory and time what the planner says today."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sharding.config import load_config
from training.config import RunConfig
from training.memory.architecture import architecture_of
from training.memory.planner import Planner, largest_bucket, strategy_of
from training.memory.report import StatedMemory, memory_report, preset_estimate, preset_note, presets

FOLDER = Path(__file__).parents[2] / "configs" / "training"
NAMES = [path.stem for path in presets()]
HARDWARE = re.compile(r"^# Hardware: (?:(\d+) x )?(\d+) x (\d+) GB\.$", re.MULTILINE)


def text_of(name):
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_loads_and_opens_with_its_command_and_hardware(name):
    config = load_config(FOLDER / f"{name}.toml", RunConfig, [])
    head = text_of(name).split("\n\n")[0]

    processes = re.search(r"--processes (\d+)", head)
    machines, cards, _ = HARDWARE.search(head).groups(default="1")
    assert f"configs/training/{name}.toml" in head
    assert int(processes[1] if processes else 1) == int(machines) * int(cards)
    assert config.batch.micro_batches_per_step >= int(machines) * int(cards)


def test_every_card_has_a_preset():
    cards = {(HARDWARE.search(text_of(name)).groups(default="1")) for name in NAMES}

    assert {("1", "1", gb) for gb in ("8", "16", "24", "48", "80")} <= cards
    assert {("1", "8", "80"), ("2", "8", "80")} <= cards


@pytest.fixture(scope="module")
def planners():
    """Those made so far: presets of the same networks and bucket share what was measured."""
    return []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_preset_states_the_memory_and_time_that_the_planner_sees_and_fits_its_hardware(name, planners):
    size, estimate = preset_estimate(FOLDER / f"{name}.toml", planners)

    for line in preset_note(size, estimate):
        assert f"# {line}" in text_of(name).splitlines()
    card = int(HARDWARE.search(text_of(name))[3])
    assert estimate.smallest_card(size) is not None and estimate.smallest_card(size) <= card
    stated = StatedMemory.of_file(FOLDER / f"{name}.toml")
    assert stated.smallest_card() == estimate.smallest_card(size)


def test_weights_gradients_and_load_in_a_preset_are_those_of_the_published_shapes():
    """The arithmetic half of what presets state, without a forward pass."""
    config = load_config(FOLDER / "stage_c_3b.toml", RunConfig, [])
    planner = Planner(architecture_of(config), largest_bucket(config), max_tokens=config.stage_c.max_tokens)
    strategy = strategy_of(config, num_processes=8)

    fixed = planner.fixed(strategy)

    assert strategy.sharding == "ddp"
    assert fixed.weights == 4 * (3_589_103_632 + 694_659_840)
    assert fixed.gradients == fixed.buffers == fixed.weights - 4 * config_elements_beside(planner)
    assert planner.fixed(replace(strategy, weights="bf16")).weights == fixed.weights // 2


def config_elements_beside(planner):
    return sum(shape.numel() for shape in planner.shapes.beside.values())


@pytest.mark.slow
def test_the_report_names_presets_and_what_fits_which_card():
    text = memory_report(load_config(FOLDER / "stage_c_1b_8gb.toml", RunConfig, [])).text()

    assert all(f"  {name} " in text for name in NAMES)
    assert "peak while loading" in text and "peak of a step" in text
