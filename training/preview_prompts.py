"""The prompts of a run's previews: those in the config, of its prompt file, of its concepts, `[filewords]` filled in.

No torch.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.compute as pc

from sharding.chunk import Chunk, ChunkError, open_chunk
from sharding.schema import Workspace
from training.caption_text import training_caption
from training.config import Prompt, RunConfig
from training.dreambooth.concept_prompts import concept_prompts
from training.plans import still_caption_settings
from training.prompt_file import read_prompts
from training.randomness import SampleIdentity
from training.run_dir import RunDir
from training.stages import stages_of

FILEWORDS = "[filewords]"


def preview_prompts(config: RunConfig, run_dir: RunDir, *, chunk: str | None = None) -> tuple[Prompt, ...]:
    """Return the prompts as they are drawn. chunk: the one to take captions from while the ledger names none.

    Raises ConfigError or FileNotFoundError for the prompt file, ChunkError when the run's first chunk is not there.
    """
    prompts = config.preview.prompts
    if config.preview.file is not None:
        prompts += read_prompts(config.preview.file, problems=config.recipe.prompt_problems)
    return _filled_in(prompts, config, run_dir, chunk) + _of_concepts(config, run_dir)


def _filled_in(
    prompts: tuple[Prompt, ...], config: RunConfig, run_dir: RunDir, chunk: str | None
) -> tuple[Prompt, ...]:
    if not any(FILEWORDS in prompt.text + prompt.negative for prompt in prompts):
        return prompts
    name = next((line.fields["chunk"] for line in run_dir.read_ledger() if line.event == "started"), chunk)
    first = run_dir.started_chunk(name, check_shards=False) if name is not None else None
    if first is None:
        raise ValueError(f"preview: {FILEWORDS} stands for a caption of the run's first chunk, but none was started")
    return with_filewords(prompts, first.read_index(), chunk=first.name, config=config)


def _of_concepts(config: RunConfig, run_dir: RunDir) -> tuple[Prompt, ...]:
    """Return the previews of concepts, their captions from the first stage that shows the concept."""
    prompts: tuple[Prompt, ...] = ()
    for wanted in concept_prompts(config):
        own = wanted.prompts
        if any(FILEWORDS in prompt.text + prompt.negative for prompt in own):
            name, index = _rows_of(wanted.concept, config, run_dir)
            own = with_filewords(own, index, chunk=name, config=config)
        prompts += own
    return prompts


def _rows_of(concept: str, config: RunConfig, run_dir: RunDir) -> tuple[str, pa.Table]:
    """Return the first stage's chunk that has a concept, and its rows of it. Raises ChunkError when none has."""
    for stage in stages_of(config):
        chunk: Chunk = run_dir.started_chunk(stage.chunk, check_shards=False) or open_chunk(
            Workspace(config.data.workspace).chunks / stage.chunk
        )
        index = chunk.read_index()
        if "concept" in index.column_names:
            rows = index.filter(pc.equal(index.column("concept"), concept))
            if rows.num_rows:
                return stage.chunk, rows
    raise ChunkError(f"preview: no stage's chunk has a picture of concept {concept}; pack its concepts again")


def with_filewords(prompts: Iterable[Prompt], index: pa.Table, *, chunk: str, config: RunConfig) -> tuple[Prompt, ...]:
    """Return the prompts with a caption in place of `[filewords]`, as it is trained but for shuffling and dropout.

    Which one is counted from the run's seed and the prompt: index order, other prompts and later launches do not
    matter. index: columns key, caption, groups. Raises ValueError when no sample has a caption.
    """
    rows = {row["key"]: row for row in index.select(["key", "caption", "groups"]).to_pylist() if row["caption"]}
    if not rows:
        raise ValueError(f"preview: {FILEWORDS} stands for a caption, but no sample of chunk {chunk} has one")
    identities = [SampleIdentity(config.seed, 0, chunk, key) for key in rows]

    def caption(purpose: str) -> str:
        identity = min(identities, key=lambda each: each.digest(purpose))
        row = rows[identity.key]
        settings = still_caption_settings(config)
        return training_caption(row["caption"], row["groups"], settings=settings, identity=identity, global_step=0)

    seen: Counter[str] = Counter()
    return tuple(_filled(prompt, caption, seen) for prompt in prompts)


def _filled(prompt: Prompt, caption: Callable[[str], str], seen: "Counter[str]") -> Prompt:
    if FILEWORDS not in prompt.text + prompt.negative:
        return prompt
    seen[prompt.text] += 1
    words = caption(f"filewords {seen[prompt.text]} {prompt.text}")
    changes = {"text": prompt.text.replace(FILEWORDS, words), "negative": prompt.negative.replace(FILEWORDS, words)}
    return prompt.model_copy(update=changes)
