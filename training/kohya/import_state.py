"""Take over weights and optimizer of kohya's stage C trainer as the first state of a run.

The state lies in RUN/imported/, beside no chunk's; the run's first chunk starts from it. One process. What kohya does
not save (step, place in the data, adaptive loss table) or cannot be used here (random numbers) is said.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sharding.config import ConfigError
from sharding.files import sha256_file
from training.config import FREE_KEYS, GROWING_KEYS, RunConfig
from training.config.parallel import ParallelConfig
from training.engines.choose import make_engine
from training.engines.scaled import ScaledEngine
from training.frozen_config import freeze_config
from training.kohya.moments import Moments, MomentsError, kohya_moments
from training.kohya.state_files import KohyaFiles, find_files, read_network, read_pickled, read_text_model
from training.lock import RunLock
from training.position import Position
from training.precision import choose_device
from training.run_dir import RunDir
from training.state import StateSaver, take_snapshot
from training.trained import Trained, load_trained
from training.weight_files import check_keys

_NETWORK, _TEXT = "network.", "text.text_model."


@dataclass
class Imported:
    """What was taken over and what was not, in sentences."""

    carried: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield them for a person."""
        yield from (f"taken over: {line}" for line in self.carried)
        yield from (f"not taken over: {line}" for line in self.left)


def import_state(config: RunConfig, root: Path, source: Path, *, step: int = 0, dry_run: bool = False) -> Iterator[str]:
    """Make the first state of the run in `root` from `source`; yield what was taken over and what was not.

    source: kohya's `-state` folder, or an exported .safetensors. step: global step that the state is at; the schedule
    goes on from there. Freezes run.toml as a first launch does, and adds a line `imported` to the ledger.
    Raises ConfigError when the run has begun or trains no whole networks, WeightsError, LockHeldError.
    """
    if step < 0:
        raise ConfigError(f"--step {step}: must not be negative")
    if config.lora is not None or config.tokens is not None:
        raise ConfigError("[lora] and [tokens] train something else than a state of kohya's full finetune holds")
    files, run_dir = find_files(source), RunDir(root)
    _require_no_start(run_dir)
    alone = config.model_copy(update={"parallel": ParallelConfig(strategy="single")})
    trained = load_trained(alone, make_engine(alone, device=choose_device(config.device), exact=False))
    report = Imported()
    _take_weights(trained, files, report)
    _take_moments(trained, files, config, report)
    _take_loss_scale(trained, files, report)
    _say_what_is_left(files, config, step, report)
    yield from report.lines()
    if not dry_run:
        yield f"state {_save(config, run_dir, trained, source, files, step, report)}: `training run` goes on from it"


def _require_no_start(run_dir: RunDir) -> None:
    if started := [line for line in run_dir.read_ledger() if line.event == "started"]:
        raise ConfigError(
            f"{run_dir.root}: has begun chunk {started[0].fields['chunk']} already; an imported state is a run's "
            "first, choose a new run folder"
        )


# --- weights ---


def _take_weights(trained: Trained, files: KohyaFiles, report: Imported) -> None:
    own = dict(trained.engine.model_state())
    taken: dict[str, Tensor] = {}
    for prefix, path, read, what in (
        (_NETWORK, files.network, read_network, "network"),
        (_TEXT, files.text, read_text_model, "text encoder"),
    ):
        expected = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
        if path is not None and expected:
            tensors = read(path)
            check_keys(expected, tensors, source=path)  # type: ignore[arg-type]
            taken |= {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
            report.carried.append(f"{what}, {len(tensors):,} tensors, from {path.name}")
        elif path is not None:
            report.left.append(f"{what} in {path.name}: the run does not train it; stage_c.text_encoder may name it")
        elif expected:
            report.left.append(f"{what}: not there; it is as the run's settings name it")
    trained.engine.load_model_state({**own, **taken})  # type: ignore[dict-item]
    if trained.ema is not None:
        weights = trained.engine.model_state()
        trained.ema.load({name: weights[name] for name in trained.ema.tensors()})  # type: ignore[misc]


# --- optimizer ---


def _take_moments(trained: Trained, files: KohyaFiles, config: RunConfig, report: Imported) -> None:
    if files.optimizer is None:
        report.left.append("optimizer: not there; it begins anew")
        return
    parameters = dict(trained.recipe.trainable().named_parameters())
    state = read_pickled(files.optimizer)
    parts = [
        {name: tensor for name, tensor in parameters.items() if name.startswith(prefix)}
        for prefix, path in ((_NETWORK, files.network), (_TEXT, files.text))
        if path is not None
    ]
    try:
        found = kohya_moments(state, [part for part in parts if part], optimizer=config.optimizer.name)
    except MomentsError as error:
        report.left.append(f"optimizer: {error}; it begins anew")
        return
    _put_moments(trained, found)
    report.carried.append(f"optimizer {config.optimizer.name}, {len(found.slots):,} parameters, {found.step:,} updates")
    if found.num_joined and config.optimizer.name == "adafactor":
        report.carried.append(
            f"  of {found.num_joined:,} stacked q, k, v exactly what Adafactor would hold of the stacked matrix; from "
            "here on it is factored, and its update bounded, for the three together"
        )
    if found.wiped:
        report.left.append(
            f"moments of {len(found.wiped):,} parameters, first {found.wiped[0]}: all 0 or not finite (cast to fp16 "
            "at a resume of kohya's); they begin anew"
        )


def _put_moments(trained: Trained, found: Moments) -> None:
    """Load moments; parameters that have none begin anew."""
    _, facts = trained.engine.optimizer_state(trained.names)
    tensors: dict[str, Tensor] = {}
    for name, entry in facts["slots"].items():
        slots = found.slots.get(name, {})
        own = {slot: value for slot, value in slots.items() if isinstance(value, Tensor)}
        tensors |= {f"{slot}/{name}": value for slot, value in own.items()}
        entry["tensors"] = list(own)
        entry["values"] = {slot: value for slot, value in slots.items() if slot not in own}
    trained.engine.load_optimizer_state(tensors, facts, trained.names)


def _take_loss_scale(trained: Trained, files: KohyaFiles, report: Imported) -> None:
    if files.scaler is None:
        return
    if isinstance(trained.engine, ScaledEngine):
        facts = read_pickled(files.scaler)
        trained.engine.loss_scale.load({"scale": facts["scale"], "good_steps": facts["_growth_tracker"]})
        report.carried.append(f"loss scale {facts['scale']:,.0f}")
    else:
        report.left.append(f'{files.scaler.name}: a loss scale is for precision.autocast = "fp16" only')


# --- what is left, and saving ---


def _say_what_is_left(files: KohyaFiles, config: RunConfig, step: int, report: Imported) -> None:
    if files.scheduler is not None:
        counted = read_pickled(files.scheduler).get("last_epoch")
        report.left.append(
            f"{files.scheduler.name}: rates are a function of the global step, here {step:,}; kohya counted {counted}, "
            f"once per process and step{': --step goes on from there' if step == 0 else ''}"
        )
    report.left += [f"{name}: not needed here" for name in files.left if not name.startswith("random_states")]
    if randoms := [name for name in files.left if name.startswith("random_states")]:
        report.left.append(f"{', '.join(randoms)}: not read; random numbers are counted from seed and key here")
    report.left.append("place in the data: kohya saves none; the run begins with the first step of its first chunk")
    if config.of_stage_c.loss_weighting == "adaptive":
        report.left.append("adaptive loss table: kohya never saves it; it begins at 1")


def _save(
    config: RunConfig,
    run_dir: RunDir,
    trained: Trained,
    source: Path,
    files: KohyaFiles,
    step: int,
    report: Imported,
) -> Path:
    run_dir.root.mkdir(parents=True, exist_ok=True)
    with RunLock.acquire(run_dir.lock_path) as lock:
        freeze_config(run_dir.config_path, config.model_dump(mode="json"), free=FREE_KEYS, growing=GROWING_KEYS)
        ledger = run_dir.open_ledger(guard=lock.check)
        _require_no_start(run_dir)
        facts: Mapping[str, Any] = {
            "global_step": step,
            "position": asdict(Position(global_step=step)),
            "plan_digests": [],
            "chunk_digest": "",
            **trained.facts(),
        }
        digests: list[str] = []
        saver = StateSaver(
            asynchronous=False, check=lock.check, on_saved=lambda _, digest: digests.append(digest), keep_last=1
        )
        folder = run_dir.imported_folder / f"state-{step:08d}"
        saver.save(folder, take_snapshot(trained.tensors(), facts))
        read = (files.network, files.text, files.optimizer)
        ledger.append(
            "imported", path=run_dir.relative(folder), manifest_digest=digests[0], global_step=step,
            source=str(source), files={path.name: sha256_file(path) for path in read if path is not None},
            left=report.left,
        )  # fmt: skip
    return folder
