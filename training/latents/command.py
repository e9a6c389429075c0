"""What `python -m training encode-latents` does: say, make or verify what a task owns. Prints nothing itself."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sharding.config import ConfigError
from sharding.files import free_bytes, require_free_bytes, size_text
from training.config import RunConfig
from training.latents.parts import LatentsError, problems_of, read_info
from training.latents.store import root_of
from training.latents.work import ChunkWork, chunks_to_encode, require_possible, work_of
from training.loading.remote import fetch_chunk, mirror_remote
from training.run_dir import RunDir


def encode_latents(
    config: RunConfig,
    root: Path | None = None,
    *,
    output: Path | None = None,
    chunk_name: str | None = None,
    chunks: str | None = None,
    with_text: bool = False,
    part_index: int = 0,
    num_parts: int = 1,
    dry_run: bool = False,
    verify: bool = False,
) -> Iterator[str]:
    """Encode what is missing of the chunks asked for; yield a line per chunk as it is done, and a last one.

    root: the run's folder, to encode its copies of chunks; None when there is none yet. output: in place of
    latents.folder. with_text: text outputs, too, as with latents.text. dry_run: only say what would be made.
    verify: only read all that is there and compare it with its hashes; raises LatentsError at the end when something
    is missing or damaged.

    Raises ConfigError, ChunkError, BrokenDataError, DiskFullError.
    """
    if dry_run and verify:
        raise ConfigError("--dry-run and --verify exclude each other")
    if output is not None:
        config = config.model_copy(update={"latents": config.latents.model_copy(update={"folder": output})})
    with_text = with_text or config.latents.text
    require_possible(config, with_text=with_text)
    mirror_remote(config.data, held_out=config.validation.chunk)
    run_dir = RunDir(root) if root is not None else None
    asked_for = chunks_to_encode(config, run_dir, chunk_name=chunk_name, chunks=chunks)
    works = work_of(asked_for, config=config, with_text=with_text, part_index=part_index, num_parts_of_all=num_parts)
    if verify:
        yield from _verified(works)
    elif dry_run:
        yield from _foreseen(works, config)
    else:
        yield from _made(works, config)


def _made(works: Iterator[ChunkWork], config: RunConfig) -> Iterator[str]:
    from training.latents.encode import Encoders, encode_chunk  # torch: a refused command answers in a moment

    encoders = Encoders(config)
    num_made, broken = 0, Counter[str]()
    for work in works:
        if missing := work.missing():
            require_free_bytes(work.store.root, work.num_bytes(missing, config), f"encoding {work.name}")
            if work.store.kind == "latents":
                fetch_chunk(config.data, work.chunk)
            broken += encode_chunk(work, config=config, encoders=encoders)
            num_made += len(missing)
        yield _line(work)
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in broken.most_common())
    yield f"{num_made:,} parts made" + f"; left out: {reasons}" * bool(reasons)


def _foreseen(works: Iterator[ChunkWork], config: RunConfig) -> Iterator[str]:
    num_missing, num_bytes, root = 0, 0, root_of(config)
    for work in works:
        missing = work.missing()
        num_missing += len(missing)
        num_bytes += work.num_bytes(missing, config)
        parts = f"{len(work.owned)} parts, {len(missing)} to be made in {work.folder}"
        yield f"{work.name}: {work.num_rows:,} rows in {parts}"
    yield (
        f"{num_missing:,} parts to be made, {size_text(num_bytes)}; {size_text(free_bytes(root))} are free in {root}"
    )


def _verified(works: Iterator[ChunkWork]) -> Iterator[str]:
    problems: list[str] = []
    for work in works:
        found = [one for number in work.owned for one in problems_of(work.folder, number, with_data=True)]
        yield _line(work) if not found else f"{work.name}: {len(found)} problems"
        problems += found
    if problems:
        listing = "\n".join(f"  {problem}" for problem in problems[:20])
        raise LatentsError(
            f"{len(problems):,} problems:\n{listing}\nrun the same command without --verify for what is missing; for a "
            "damaged file, delete the .json beside it first"
        )
    yield "all there, all as written"


def _line(work: ChunkWork) -> str:
    infos = [info for number in work.owned if (info := read_info(work.folder, number)) is not None]
    num_bytes = sum(info.data.num_bytes + info.index.num_bytes for info in infos)
    return (
        f"{work.name}: {sum(info.num_rows for info in infos):,} rows in {len(infos)} parts, "
        f"{sum(info.num_broken for info in infos):,} broken, {num_bytes / 1e6:,.1f} MB in {work.folder}"
    )
