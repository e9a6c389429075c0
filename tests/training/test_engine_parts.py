"""Engines that hold a model in parts: gradients, weights and states equal those of one process and plain torch."""

import importlib.util
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from sharding.config import ConfigError
from tests.training.toy import ListRecorder, ToyRecipe, toy_batches, toy_config, toy_plan
from training.config.parallel import IN_PARTS, LIMITS, limits_table
from training.config.precision import EmaConfig
from training.ema import make_ema
from training.engines.choose import make_engine
from training.engines.plain import PlainEngine
from training.loop import train_epoch
from training.optimizers import make_optimizer
from training.position import Position
from training.state import help_snapshot, take_snapshot
from training.state_folder import LoadedState
from training.state_manifest import Manifest
from training.trained import Trained

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="DeepSpeed, or the g++ that it needs on a CPU, is not installed",
)
ZERO = [pytest.param(f"zero{stage}", marks=[needs_deepspeed, pytest.mark.slow]) for stage in (1, 2, 3)]
FSDP = {"strategy": "fsdp2"}
ADAM = {"name": "adamw", "learning_rate": 0.01, "eps": 1e-3}  # a small eps would make signs of rounding


class PartsRecipe(ToyRecipe):
    """The toy recipe with a frozen parameter and sizes that no number of processes divides."""

    def __init__(self, nan_keys: tuple[str, ...] = ()) -> None:
        super().__init__(nan_keys=nan_keys)
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(48, 7), nn.Tanh(), nn.ModuleDict({"last": nn.Linear(7, 3)})["last"])
        self.module[0].bias.requires_grad_(False)

    def state_tensors(self):
        return {}


def train(parallel, *, optimizer=None, ema=False, broken=(), nan_keys=(), state=None, exact=True, compiled=False):
    """Train the toy plan as one rank; return weights, optimizer tensors and facts (rank 0's) and what was told."""
    torch.set_num_threads(1)
    config = toy_config(parallel=parallel, optimizer=optimizer or {"max_grad_norm": 0.05}, precision={"autocast": "no"})
    engine = make_engine(config, device=torch.device("cpu"), exact=exact)
    recipe, recorder = PartsRecipe(nan_keys), ListRecorder()
    parameters = [one for one in recipe.module.parameters() if one.requires_grad]
    rate = config.optimizer.learning_rate
    if optimizer is None:  # the gradient itself: AdamW would hide a wrong factor
        made = torch.optim.SGD([{"params": parameters, "lr": rate, "peak_rate": rate, "part": "network"}])
    else:
        made = make_optimizer(
            config.optimizer.name, {"network": parameters}, learning_rates={"network": rate}, eps=config.optimizer.eps
        )
    if compiled:
        recipe.module.compile(backend="aot_eager")
    model = engine.prepare(recipe.module, made)
    by_name = dict(recipe.module.named_parameters())
    names = {parameter: name for name, parameter in by_name.items()}
    average = make_ema(EmaConfig(enabled=ema, decay=0.5), by_name)
    trained = Trained(recipe, engine, model, made, names, average)
    shown = [show(recipe.module)]  # a preview before the first step, as when a launch finishes what another began
    if state is not None:
        trained.load(state)
    plan = toy_plan(config)
    batches = toy_batches(plan, rank=engine.rank, world_size=engine.world_size, broken=broken)
    end, _ = train_epoch(
        plan, batches, position=Position(chunk="toy/0000"), config=config, trained=trained, recorder=recorder
    )
    with trained.shown():
        shown.append(show(recipe.module))
    shown.append(show(recipe.module))
    tensors, facts = trained.tensors(), {"global_step": end.global_step, **trained.facts()}
    if engine.rank != 0:
        help_snapshot(tensors)
        return {"rows": recorder.rows, "events": recorder.events, "shown": shown}
    snapshot = take_snapshot(tensors, facts)
    told = {"rows": recorder.rows, "events": recorder.events, "shown": shown}
    return {**told, "tensors": snapshot.tensors, "facts": snapshot.facts}


@torch.no_grad()
def show(module):
    """Call networks as a preview does: one by one, without the module around them."""
    return module[2](module[0](torch.ones(1, 48)))


class SavedState(LoadedState):
    """A state that was never written."""

    def __init__(self, saved) -> None:
        super().__init__(Path("none"), Manifest(0), saved["facts"])
        object.__setattr__(self, "saved", saved["tensors"])

    @property
    def components(self):
        return tuple(self.saved)

    def tensors(self, component):
        return self.saved[component]

    component = tensors


def _rank(rank, world_size, port, machines, options, path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(world_size // machines),
    }  # fmt: skip
    if isinstance(options.get("state"), dict):
        options["state"] = SavedState(options["state"])
    torch.save(train(**options), f"{path}.{rank}")
    torch.distributed.barrier()


def train_on(world_size, path, *, machines=1, **options):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.toy", "training.engines.choose", "torch.distributed.fsdp"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, machines, options, str(path)))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
    assert [process.exitcode for process in ranks] == [0] * world_size
    return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(world_size)]


def assert_same(ours, theirs) -> None:
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    for component, tensors in theirs["tensors"].items():
        assert ours["tensors"][component].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours["tensors"][component][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert ours["facts"] == theirs["facts"]
    for one, other in zip(ours["shown"], theirs["shown"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for row, expected in zip(ours["rows"], theirs["rows"], strict=True):
        assert row.keys() == expected.keys()
        for key in {"train/loss", "train/grad_norm"} & expected.keys():
            assert row[key] == pytest.approx(expected[key], rel=1e-5, nan_ok=True)


def one_of_everything():
    """A broken image in the micro-batch that padding repeats, and one whose loss is no number, on the second rank."""
    plan = toy_plan(toy_config())
    return {
        "broken": (plan.steps[0].micro_batches[0].samples[0].key,),
        "nan_keys": (plan.steps[1].micro_batches[1].samples[0].key,),
    }


@pytest.mark.parametrize("strategy", ["fsdp2", *ZERO])
def test_gradients_clipping_broken_images_and_steps_passed_over_are_those_of_one_process(tmp_path, strategy):
    trouble = one_of_everything()
    alone = train({}, **trouble)

    first, second = train_on(2, tmp_path / "run", parallel={"strategy": strategy}, **trouble)

    assert_same(first, alone)
    assert first["events"] == second["events"] == alone["events"]
    assert [event[0] for event in alone["events"]] == ["broken", "skipped"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "optimizer", "world_size", "machines"),
    [
        (FSDP, {"name": "adafactor", "learning_rate": 0.01}, 3, 1),
        (FSDP | {"gradients_meet": "micro_batch"}, {"name": "lion", "learning_rate": 0.001}, 3, 1),
        (FSDP | {"shard": "hybrid"}, ADAM, 4, 2),
        pytest.param({"strategy": "zero2", "offload": "optimizer"}, ADAM, 3, 1, marks=needs_deepspeed),
        pytest.param({"strategy": "zero3", "offload": "optimizer_and_weights"}, ADAM, 2, 1, marks=needs_deepspeed),
        pytest.param({"strategy": "zero2"}, ADAM, 1, 1, marks=needs_deepspeed),
    ],
    ids=["adafactor", "every micro-batch", "hybrid", "zero2 offload", "zero3 offload", "alone"],
)
def test_optimizers_and_ways_of_sharing_give_the_weights_of_one_process(
    tmp_path, parallel, optimizer, world_size, machines
):
    trouble = one_of_everything()
    alone = train({}, optimizer=optimizer, **trouble)

    ours = train_on(world_size, tmp_path / "run", machines=machines, parallel=parallel, optimizer=optimizer, **trouble)

    assert_same(ours[0], alone)


@pytest.mark.slow
def test_two_processes_train_a_compiled_network(tmp_path):
    trouble = one_of_everything()
    alone = train({}, optimizer=ADAM, **trouble)

    ours = train_on(2, tmp_path / "run", parallel={}, optimizer=ADAM, exact=False, compiled=True, **trouble)

    assert_same(ours[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", *ZERO])
def test_a_state_goes_from_one_process_to_parts_and_back(tmp_path, strategy):
    before = train({}, optimizer=ADAM)
    alone = train({}, optimizer=ADAM, state=SavedState(before))

    in_parts = train_on(2, tmp_path / "run", parallel={"strategy": strategy}, optimizer=ADAM, state=before)[0]
    back = train({}, optimizer=ADAM, state=SavedState(in_parts))

    assert_same(in_parts, alone)
    assert_same(back, train({}, optimizer=ADAM, state=SavedState(alone)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", *ZERO[2:]])
def test_a_state_for_another_network_is_refused_in_parts(tmp_path, strategy):
    before = train({}, optimizer=ADAM)
    before["tensors"]["model"]["0.weight"] = torch.zeros(2, 2)

    with pytest.raises(AssertionError, match="1, 1"):
        train_on(2, tmp_path / "run", parallel={"strategy": strategy}, optimizer=ADAM, state=before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "optimizer", "ema"),
    [
        (FSDP, {"name": "schedule_free", "learning_rate": 0.1}, False),
        (FSDP, ADAM, True),
        pytest.param({"strategy": "zero2"}, ADAM, True, marks=needs_deepspeed),
    ],
    ids=["schedule free", "fsdp2", "zero2"],
)
def test_averages_are_shown_and_saved_as_those_of_one_process(tmp_path, parallel, optimizer, ema):
    if optimizer["name"] == "schedule_free":
        pytest.importorskip("schedulefree")
    alone = train({}, optimizer=optimizer, ema=ema)

    ours = train_on(2, tmp_path / "run", parallel=parallel, optimizer=optimizer, ema=ema)

    assert_same(ours[0], alone)
    assert not torch.equal(alone["shown"][1], alone["shown"][2])
    torch.testing.assert_close(ours[1]["shown"], alone["shown"], rtol=1e-5, atol=1e-5)


def test_single_refuses_several_processes(monkeypatch):
    monkeypatch.setattr("training.engines.choose.Accelerator", lambda **_: type("Two", (), {"num_processes": 2})())
    config = toy_config(parallel={"strategy": "single"})

    with pytest.raises(ConfigError, match="2 processes"):
        make_engine(config, device=torch.device("cpu"), exact=True)


def test_fsdp_alone_is_a_plain_run():
    engine = make_engine(
        toy_config(parallel=FSDP, precision={"autocast": "no"}), device=torch.device("cpu"), exact=True
    )

    assert type(engine) is PlainEngine


@pytest.mark.parametrize(
    ("parallel", "more", "problem"),
    [
        ({"strategy": "zero2"}, {"optimizer": {"name": "adafactor", "max_grad_norm": 1.0}}, "rows and columns"),
        (FSDP, {"optimizer": {"name": "adamw8bit"}}, "blocks"),
        (FSDP, {"precision": {"autocast": "fp16"}}, "loss scale"),
        (FSDP, {"precision": {"autocast": "bf16", "weights": "bf16"}}, "fp32"),
        ({"strategy": "zero3"}, {"ema": {"enabled": True}}, "average"),
        ({"strategy": "ddp", "shard": "hybrid"}, {}, "fsdp2"),
        (FSDP | {"offload": "optimizer"}, {}, "zero1"),
        ({"strategy": "zero2", "offload": "optimizer_and_weights"}, {}, "zero3"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(parallel, more, problem):
    with pytest.raises(ValueError, match=problem):
        toy_config(parallel=parallel, **more)


def test_the_table_of_limits_stands_in_the_readme():
    readme = (Path(__file__).parents[2] / "training" / "README.md").read_text()

    assert limits_table() in readme
    assert all(set(limit.strategies) <= {"single", "ddp", *IN_PARTS} for limit in LIMITS)
