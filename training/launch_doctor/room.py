"""Disk forecast, memory plan, and what a step needs of loader and network: arithmetic on rank 0, nothing is trained."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.chunk import Chunk
from sharding.files import free_bytes, size_text
from training.config import RunConfig
from training.forecast import DiskForecast, disk_forecast, folder_bytes
from training.inspect_run import inspect_plan
from training.launch_doctor.data import DataFindings, next_chunk
from training.launch_doctor.process import Process
from training.launch_doctor.report import Row, listing
from training.memory.architecture import architecture_of
from training.memory.planner import Estimate, Planner, largest_bucket, room_bytes, strategy_of
from training.memory.report import state_bytes
from training.plan_report import PlanReport
from training.prompt_file import read_prompts
from training.stages import epochs_of, stage_config

_UTILISATION = 0.4
"""Share of measured products that a training step reaches, at most: what the loader is compared with."""
_WAIT_FRACTION = 0.3
"""Of a step's compute, that exchanging gradients may take before it is worth a word."""


@dataclass(frozen=True)
class Step:
    """One rank's share of a step. gradient_bytes: exchanged once a step."""

    flops_per_image: int
    images_per_rank: float
    gradient_bytes: int
    estimate: Estimate
    micro_batch_size: int


def room_rows(
    config: RunConfig,
    root: Path,
    processes: Sequence[Process],
    data: Mapping[int, DataFindings],
    *,
    bytes_per_second: float | None,
) -> Iterator[Row]:
    """Yield rows. data: by rank; bytes_per_second: of all_reduce, None when there is one process."""
    chunk = next_chunk(config, root) if config.data.remote is None else None
    if chunk is None:
        yield Row("settings", "all chunks are done, or they are not here yet", "a chunk to train")
        return
    report = inspect_plan(config, root, chunk_name=chunk.name, num_processes=len(processes))
    assert report is not None
    yield _settings_row(report)
    config = stage_config(config, chunk.name)
    planner = Planner(architecture_of(config), largest_bucket(config), max_tokens=config.recipe.max_tokens)
    trained = sum(shape.numel() for shape in planner.shapes.trained.values())
    estimate = planner.estimate(strategy_of(config, num_processes=len(processes)))
    step = Step(
        estimate.activations.flops_per_image,
        config.batch.batch_size / len(processes),
        trained * (4 if config.precision.weights == "fp32" else 2),
        estimate,
        config.batch.micro_batch_size,
    )
    yield memory_row(step, processes)
    forecast = forecast_before(config, chunk, report, planner)
    used, free = folder_bytes(root), free_bytes(root)
    yield disk_row(forecast, chunk.name, keep_states=config.save.keep_states, free_bytes=free, used_bytes=used)
    yield decode_row(config, step, processes, data)
    if bytes_per_second is not None:
        yield exchange_row(step, len(processes), data, bytes_per_second)


def forecast_before(config: RunConfig, chunk: Chunk, report: PlanReport, planner: Planner) -> DiskForecast:
    """Return how large the run folder gets, from shapes: no network is loaded. report: of the chunk."""
    epochs = epochs_of(config)(chunk.name)
    trained, beside = (shapes.values() for shapes in (planner.shapes.trained, planner.shapes.beside))
    prompts = config.preview.prompts
    if config.preview.file is not None:
        prompts += read_prompts(config.preview.file, problems=config.recipe.prompt_problems)
    return disk_forecast(
        config,
        num_chunks=report.run.num_chunks,
        num_steps=report.num_steps * epochs,
        num_images=report.num_exposures * epochs,
        index_bytes=chunk.index_path.stat().st_size,
        num_tensors=5 * len(trained) + len(beside),
        state_bytes=state_bytes(config)[0],
        num_parameters=sum(shape.numel() for shape in (*trained, *beside)),
        prompts=prompts,
    )


def memory_row(step: Step, processes: Sequence[Process]) -> Row:
    """Return the row that compares the memory plan with each card, or with each node's memory on CPUs."""
    peak = step.estimate.peak(step.micro_batch_size)
    short, least = list[int](), math.inf
    for process in processes:
        device = process.device
        sharing = 1 if device.is_gpu else sum(one.node == process.node for one in processes)
        room = min(room_bytes(device.total_bytes), device.free_bytes) / sharing
        least = min(least, room)
        if device.total_bytes and room < peak:
            short.append(process.rank)
    found, wanted = f"{size_text(int(least))} usable on the fullest", f"{size_text(peak)} a rank, planned"
    if not short:
        return Row("memory", found, wanted)
    advice = (
        "python -m training plan --memory lists what fits: micro_batch_size, precision.weights, optimizer, parallel"
    )
    return Row("memory", f"{found}; too little for rank {listing(short)}", wanted, "fail", advice)


def decode_row(config: RunConfig, step: Step, processes: Sequence[Process], data: Mapping[int, DataFindings]) -> Row:
    """Return the row that compares the loaders of the slowest rank with what its step can take."""
    if config.latents.use:
        return Row("decoding", "nothing is decoded (latents.use)", "no waiting for data")
    rates = {rank: one.images_per_second for rank, one in data.items() if one.images_per_second is not None}
    if not rates:
        return Row("decoding", "not measured: no chunk could be read", "no waiting for data", "warn", "see chunk")
    by_rank = {process.rank: process for process in processes}

    def loaders_of(rank: int) -> float:
        process = by_rank[rank]
        cores = process.num_cpus / process.local_world_size
        return min(max(config.data.workers, 1), max(cores, 1.0))

    supply = {rank: rate * loaders_of(rank) for rank, rate in rates.items()}
    slow = min(supply, key=lambda rank: supply[rank])
    need = _UTILISATION * data[slow].flops_per_second / step.flops_per_image
    found = f"{supply[slow]:.1f} images/s (rank {slow}: {rates[slow]:.1f} x {loaders_of(slow):g} workers)"
    wanted = f"{need:.1f} images/s at {_UTILISATION:.0%} of the measured TFLOP/s"
    if supply[slow] >= need:
        return Row("decoding", found, wanted)
    workers = math.ceil(need / rates[slow])
    advice = f"set data.workers = {workers} and ask Slurm for as many cores per rank, or encode-latents once"
    return Row("decoding", found, wanted, "warn", advice)


def exchange_row(step: Step, world: int, data: Mapping[int, DataFindings], bytes_per_second: float) -> Row:
    """Return the row about the exchange of gradients, once a step."""
    seconds = 2 * (world - 1) / world * step.gradient_bytes / bytes_per_second
    slowest = min((one.flops_per_second for one in data.values()), default=0.0)
    compute = step.images_per_rank * step.flops_per_image / (_UTILISATION * slowest) if slowest else math.inf
    found = f"{size_text(step.gradient_bytes)} of gradients in {seconds:.2f} s a step"
    wanted = f"under {_WAIT_FRACTION:.0%} of {compute:.2f} s of compute"
    if seconds <= _WAIT_FRACTION * compute:
        return Row("exchange", found, wanted)
    advice = "a larger batch.batch_size exchanges less often; or a faster network interface (see bandwidth)"
    return Row("exchange", found, wanted, "warn", advice)


def _settings_row(report: PlanReport) -> Row:
    refused = [finding.text for finding in report.refusals]
    if refused:
        return Row("settings", "; ".join(refused), "a run that may start", "fail", "correct RUN.toml")
    warned = [finding.text for finding in report.findings]
    text = f"{report.chunk}: {report.num_steps:,} steps an epoch" + "".join(f"; {one}" for one in warned)
    return Row("settings", text, "a run that may start", "warn" if warned else "ok", "see plan" * bool(warned))


def disk_row(forecast: DiskForecast, chunk: str, *, keep_states: int, free_bytes: int, used_bytes: int) -> Row:
    """Return the row that compares the disk with the chunk that comes, and with the whole run.

    used_bytes: what the run folder holds already.
    """
    soon = (keep_states + 1) * forecast.state_bytes + forecast.export_bytes
    found = f"{size_text(free_bytes)} free, {size_text(used_bytes)} used by the run"
    wanted = f"{size_text(soon)} for {chunk}, {size_text(forecast.total)} for the run"
    advice = "lower save.keep_exports, save.keep_every_chunks or save.keep_chunks, or take a larger disk"
    if soon > free_bytes + used_bytes:
        return Row("disk", found, wanted, "fail", advice)
    if forecast.total - used_bytes > free_bytes:
        return Row("disk", found, wanted, "warn", f"that does not last to the end: {advice}")
    return Row("disk", found, wanted)
