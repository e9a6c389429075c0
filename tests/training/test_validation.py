"""Validation with a toy recipe, on one rank and on several (threads), and what it leaves alone."""

import json
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sharding.chunk import open_chunk
from sharding.config import ConfigError
from sharding.schema import Workspace
from tests.training.conftest import make_chunk
from tests.training.toy import ToyRecipe, toy_config
from training.position import Position
from training.recipes.base import Loss
from training.run_dir import RunDir
from training.validation import Validation, eval_mode, fixed_timestep, validation_plan

POSITION = Position(chunk="made/0000", global_step=12)


def held_out(workspace, num_samples=5, *, says_so=True):
    make_chunk(workspace, 7, num_samples)
    chunks = Workspace(workspace).chunks / "made"
    (chunks / "0007").rename(chunks / "held-out")
    path = chunks / "held-out" / "chunk.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "made/held-out", "is_held_out": says_so}))


def config_of(workspace, **changes):
    return toy_config(
        data={"workspace": str(workspace), "workers": 0}, validation={"chunk": "made/held-out", **changes},
        buckets={"resolution": [256, 256], "step": 32},
    )  # fmt: skip


class Ranks:
    """Engines of several ranks in threads of one process."""

    def __init__(self, world_size):
        self.world_size, self.values = world_size, [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=20)

    def engine(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return SimpleNamespace(
            rank=rank, world_size=self.world_size, gather=gather, autocast=nullcontext, barrier=self.barrier.wait
        )


class FakeRecords:
    def __init__(self, validated_step=-1):
        self.rows, self.validated_step = [], validated_step

    def is_validated(self, position):
        return position.global_step == self.validated_step

    def validated(self, position, row):
        self.rows.append((position.global_step, row))


class FixedRecipe(ToyRecipe):
    """The toy with a loss that depends on pixels, weights, caption and timestep."""

    def loss(self, model, batch, *, timesteps=None):
        rgb = batch.images.float().mean(dim=(2, 3)) / 255
        outputs = model(rgb.repeat(1, 16)).mean(dim=1)
        words = torch.tensor([float(len(caption)) for caption in batch.captions])
        return Loss(outputs + torch.tensor(timesteps) + words, torch.ones(len(outputs)))


def run_ranks(config, root, world_size, *, stops=(), records=None):
    """Return rank 0's rows and every rank's answer. stops: ranks that were asked to stop."""
    ranks, records = Ranks(world_size), records or FakeRecords()
    answers, recipes = [None] * world_size, [FixedRecipe(dropout=0.5) for _ in range(world_size)]

    def work(number):
        engine = ranks.engine(number)
        rank = SimpleNamespace(
            config=config, run_dir=RunDir(root), engine=engine, is_main=number == 0,
            records=records if number == 0 else None,
            agreed_stop=lambda: next((r for r in engine.gather("asked" if number in stops else "") if r), ""),
            from_main=lambda ask: engine.gather(ask() if number == 0 else None)[0],
        )  # fmt: skip
        trained = SimpleNamespace(recipe=recipes[number], model=recipes[number].module, shown=nullcontext)
        answers[number] = Validation(rank).run(trained, POSITION)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return records.rows, answers


def without_time(rows):
    return [(step, {name: value for name, value in row.items() if "seconds" not in name}) for step, row in rows]


def test_any_number_of_ranks_gives_the_same_losses(tmp_path):
    held_out(tmp_path / "ws", num_samples=5)
    config = config_of(tmp_path / "ws")

    (alone, answers), (two, _), (four, _) = (run_ranks(config, tmp_path / "run", count) for count in (1, 2, 4))

    assert answers == [""]
    ((step, row),) = alone
    assert (step, row["validation/num_images"]) == (12, 5)
    assert any(name.startswith("validation/timestep_0.") for name in row)
    assert without_time(alone) == without_time(two) == without_time(four)


def test_a_stop_on_one_rank_stops_all_and_records_nothing(tmp_path):
    held_out(tmp_path / "ws")

    rows, answers = run_ranks(config_of(tmp_path / "ws"), tmp_path / "run", 2, stops=(1,))

    assert (rows, answers) == ([], ["asked", "asked"])


def test_a_step_that_has_its_validation_is_not_validated_again(tmp_path):
    held_out(tmp_path / "ws")

    rows, answers = run_ranks(config_of(tmp_path / "ws"), tmp_path / "run", 1, records=FakeRecords(validated_step=12))

    assert (rows, answers) == ([], [""])


def test_no_chunk_no_validation(tmp_path):
    rows, answers = run_ranks(toy_config(), tmp_path / "run", 1)

    assert (rows, answers) == ([], [""])


def test_captions_do_not_change_with_dropout_or_warm_up(tmp_path):
    held_out(tmp_path / "ws")
    config = config_of(tmp_path / "ws")
    dropping = toy_config(caption={"shuffle": True, "caption_dropout_fraction": 0.99}).caption

    plain, _ = run_ranks(config, tmp_path / "a", 1)
    dropped, _ = run_ranks(config.model_copy(update={"caption": dropping}), tmp_path / "b", 1)

    assert without_time(plain) == without_time(dropped)


def test_random_numbers_weights_and_modes_stay_as_they_were():
    recipe = FixedRecipe(dropout=0.5)
    recipe.module[1].eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()

    with eval_mode(recipe.module), pytest.raises(KeyError):
        recipe.module(torch.zeros(1, 48))
        assert not recipe.module.training
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in recipe.module] == [True, False, True, True]


def test_the_pictures_are_the_same_whatever_else_is_held_out(tmp_path):
    config = config_of(tmp_path, max_images=4)

    def keys(num_samples):
        make_chunk(tmp_path / str(num_samples), 0, num_samples)
        index = open_chunk(Workspace(tmp_path / str(num_samples)).chunks / "made" / "0000").read_index()
        plan = validation_plan(index, "made/held-out", config=config)
        samples = [sample for batch in plan.micro_batches() for sample in batch.samples]
        assert all(index["key"][sample.row].as_py() == sample.key for sample in samples)
        return {sample.key: fixed_timestep(sample.identity(seed=3, epoch=0, chunk="c")) for sample in samples}

    few, more = keys(6), keys(7)

    assert len(few) == len(more) == 4
    assert len(few.keys() & more.keys()) >= 3
    assert all(more[key] == few[key] for key in few.keys() & more.keys())


def test_a_chunk_that_is_trained_is_refused(tmp_path):
    held_out(tmp_path / "ws", says_so=False)

    with pytest.raises(ConfigError, match="made/held-out: is not held out"):
        Validation(SimpleNamespace(config=config_of(tmp_path / "ws")))  # type: ignore[arg-type]


def test_other_pictures_than_at_the_last_launch_are_said_aloud(tmp_path, caplog):
    held_out(tmp_path / "ws")
    run_ranks(config_of(tmp_path / "ws"), tmp_path / "run", 1)
    quiet = caplog.text
    run_ranks(config_of(tmp_path / "ws", max_images=2), tmp_path / "run", 1)

    assert "curve is another one" not in quiet
    assert "curve is another one" in caplog.text


def test_steps_without_a_chunk_are_refused():
    with pytest.raises(ValueError, match="no chunk is named"):
        toy_config(validation={"every_steps": 5})
