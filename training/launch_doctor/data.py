"""Weights and the next chunk from every node, and how fast this process decodes and computes, in a few seconds."""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sharding.chunk import Chunk, ChunkError
from training.campaign import read_campaign
from training.chunk_data import ChunkData, ChunkSource
from training.config import RunConfig
from training.launch_doctor.report import Row, listing
from training.launch_doctor.team import Answer
from training.plans import batch_plan, caption_settings, pixel_settings
from training.run_dir import RunDir
from training.stages import epochs_of, stage_config

_DECODE_SECONDS, _COMPUTE_SECONDS = 2.0, 0.5
_WEIGHTS = ("network", "model", "text_encoder", "tokenizer", "effnet", "previewer", "image_encoder", "vae")
_UNEVEN_FRACTION = 0.85
"""A rank that computes less than this share of the median holds all others up."""


@dataclass(frozen=True)
class DataFindings:
    """What one rank saw. files: bytes by name, None for what is not there; rates: of this process."""

    files: Mapping[str, int | None] = field(default_factory=dict)
    chunk: str = ""
    chunk_digest: str = ""
    chunk_problem: str = ""
    images_per_second: float | None = None
    flops_per_second: float = 0.0


def look_at_data(config: RunConfig, root: Path, device: torch.device, *, is_scout: bool) -> DataFindings:
    """Look at weights (one process of each node) and at the next chunk; measure decoding and computing."""
    flops = measure_flops(device)
    files = dict(_weight_files(config)) if is_scout else {}
    if config.data.remote is not None:
        return DataFindings(files, flops_per_second=flops)
    try:
        chunk = next_chunk(config, root)
        if chunk is None:
            return DataFindings(files, flops_per_second=flops)
        missing = [name for name in _shards(chunk) if not chunk.shard_path(name).is_file()]
        if missing:
            raise ChunkError(f"{len(missing)} shards are missing, first {chunk.shard_path(missing[0])}")
        rate = _decode_rate(stage_config(config, chunk.name), chunk)
        return DataFindings(files, chunk.name, chunk.info.digest, "", rate, flops)
    except (ValueError, OSError) as error:
        return DataFindings(files, chunk_problem=f"{type(error).__name__}: {error}", flops_per_second=flops)


def next_chunk(config: RunConfig, root: Path) -> Chunk | None:
    """Return the chunk that a launch would train now; None when all are done. Raises as `read_campaign`."""
    run_dir = RunDir(root)
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir, epochs=epochs_of(config))
    return campaign.chunk(campaign.next) if campaign.next is not None else None


def measure_flops(device: torch.device) -> float:
    """Return the operations a second of matrix products: bf16 on a GPU, fp32 on a CPU."""
    side, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    number, start = -1, 0.0  # the first product is not counted: it loads the kernel
    while number < 1 or time.perf_counter() - start < _COMPUTE_SECONDS:
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        number += 1
        start = start or time.perf_counter()
    return 2.0 * side**3 * number / (time.perf_counter() - start)


def data_rows(answers: Sequence[Answer[DataFindings]], nodes: Mapping[int, str]) -> Iterator[Row]:
    """Yield rows. Answers: of all ranks, by rank; nodes: names by rank."""
    problems = {rank: answer.problem for rank, answer in enumerate(answers) if answer.value is None}
    if problems:
        first = min(problems)
        yield Row(
            "data", f"rank {listing(list(problems))}: {problems[first]}", "readable everywhere", "fail", "see there"
        )
    found = {rank: answer.value for rank, answer in enumerate(answers) if answer.value is not None}
    if found:
        yield _weights_row({rank: one.files for rank, one in found.items() if one.files}, nodes)
        yield _chunk_row(found, nodes)
        yield _compute_row({rank: one.flops_per_second for rank, one in found.items()}, nodes)


def _weight_files(config: RunConfig) -> Iterator[tuple[str, int | None]]:
    """Yield weights named in the recipe's settings. A name that is no path here is a hub's, or "builtin"."""
    for key in _WEIGHTS:
        value = getattr(config.recipe, key, None)
        if not isinstance(value, str) or value == "builtin":
            continue
        path = Path(value)
        if path.is_dir():
            yield value, sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        elif path.is_file():
            with path.open("rb") as stream:
                stream.read(8)
            yield value, path.stat().st_size
        else:
            yield value, None


def _shards(chunk: Chunk) -> list[str]:
    return sorted(set(chunk.read_index().column("shard").to_pylist()))


def _decode_rate(config: RunConfig, chunk: Chunk) -> float | None:
    """Return the images a second that this process loads as training does; None where nothing is decoded."""
    if config.latents.use:
        return None
    index = chunk.read_index()
    plan = batch_plan(index, chunk.name, config=config, epoch=0)
    data = ChunkData(
        ChunkSource.of_chunk(chunk), plan, rank=0, world_size=1, captions=caption_settings(config),
        pixels=pixel_settings(config), with_checksum=config.data.verify_shards == "each_use",
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a loader's worker has it
    try:
        data[0]  # the index is read with the first
        number, start = 0, time.perf_counter()
        for item in itertools.cycle(range(data.num_items[0])):
            number += len(data[item].captions)
            if time.perf_counter() - start > _DECODE_SECONDS:
                break
        return number / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)


def _weights_row(by_rank: Mapping[int, Mapping[str, int | None]], nodes: Mapping[int, str]) -> Row:
    sizes = defaultdict[str, dict[str, int | None]](dict)
    for rank, files in by_rank.items():
        for name, size in files.items():
            sizes[name][nodes[rank]] = size
    odd = {name: seen for name, seen in sizes.items() if len(set(seen.values())) > 1}
    absent = [name for name, seen in sizes.items() if set(seen.values()) == {None}]
    if odd:
        name, seen = next(iter(odd.items()))
        which = ", ".join(f"{node} {'missing' if size is None else f'{size:,} bytes'}" for node, size in seen.items())
        advice = "put weights on the shared disk, or copy the same files to every node"
        return Row("weights", f"{name}: {which}", "the same on all nodes", "fail", advice)
    if lost := [name for name in absent if name.endswith(".safetensors") or name.startswith(("/", ".", "~"))]:
        return Row(
            "weights", f"{lost[0]} is not there", "readable on all nodes", "fail", "correct the path in RUN.toml"
        )
    if absent:
        advice = "every node downloads them, or reads its cache: fetch them before, and set HF_HUB_OFFLINE=1"
        return Row("weights", f"from the hub: {', '.join(absent)}", "readable on all nodes", "warn", advice)
    return Row("weights", f"{len(sizes)} files or folders, the same sizes", "the same on all nodes")


def _chunk_row(found: Mapping[int, DataFindings], nodes: Mapping[int, str]) -> Row:
    broken = {rank: one.chunk_problem for rank, one in found.items() if one.chunk_problem}
    if broken:
        first = min(broken)
        where = ", ".join(sorted({nodes[rank] for rank in broken}))
        advice = f"is the workspace mounted on {where}? Then run `python -m sharding verify`"
        return Row("chunk", f"{where}: {broken[first]}", "readable on all nodes", "fail", advice)
    names = {(one.chunk, one.chunk_digest) for one in found.values()}
    if len(names) > 1:
        shown = " / ".join(sorted({f"{name} {digest[:8]}" for name, digest in names}))
        advice = "nodes see different workspaces: mount the same disk everywhere"
        return Row("chunk", f"not the same on all nodes: {shown}", "the same on all nodes", "fail", advice)
    name = next(iter(names))[0]
    if not name:
        return Row("chunk", "none to look at: all are done, or fetched from data.remote", "readable on all nodes")
    return Row("chunk", f"{name} is next; its shards are there", "readable on all nodes")


def _compute_row(flops: Mapping[int, float], nodes: Mapping[int, str]) -> Row:
    ordered = sorted(flops.values())
    median = ordered[len(ordered) // 2]
    slow = [rank for rank, rate in flops.items() if rate < _UNEVEN_FRACTION * median]
    text = f"matrix products: {ordered[0] / 1e12:.2f}–{ordered[-1] / 1e12:.2f} TFLOP/s a rank"
    if not slow:
        return Row("compute", text, f"none under {_UNEVEN_FRACTION:.0%} of the median")
    where = ", ".join(f"rank {rank} ({nodes[rank]})" for rank in slow)
    advice = "the slowest rank sets the pace: is the card throttled, or somebody else's job on that node?"
    return Row("compute", f"{text}; slow: {where}", f"none under {_UNEVEN_FRACTION:.0%} of the median", "warn", advice)
