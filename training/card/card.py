"""The whole card: gather what run folder and workspace say, then write it down in the order of the seed's card."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharding.chunk import list_chunks
from sharding.config import DatasetConfig
from sharding.schema import Workspace
from training.campaign import read_campaign
from training.card.dataset import (
    SetSize,
    WordCounts,
    closed_groups,
    count_words,
    set_order,
    set_sizes,
    size_notes,
    size_table,
    tag_sections,
)
from training.card.guides import HERE, code_example, ui_guides
from training.card.hours import hours_lines
from training.card.notes import Notes
from training.card.settings import front_matter, is_of_adapters, parameter_lines, require_licence
from training.card.status import (
    SetStatus,
    chunk_status,
    chunk_table,
    concept_table,
    has_concepts,
    image_table,
    stage_table,
)
from training.card.tables import dotted
from training.chunk_records import Totals, totals
from training.config import RunConfig
from training.device_times import DeviceTime, device_times
from training.memory.sd_architecture import family_of_model
from training.run_dir import RunDir
from training.stages import epochs_of
from training.status_tables import StatusRow, campaign_counts, dataset_rows


@dataclass(frozen=True)
class CardFacts:
    """What the card says of a run. concepts: the tables of a run on packed concepts, in place of the data set's."""

    run_dir: Path
    run_json: Mapping[str, Any]
    totals: Totals
    times: Sequence[DeviceTime]
    chunks: Sequence[SetStatus]
    images: Sequence[StatusRow]
    chunk_size: int | None
    """Images in most chunks; None when there is none."""
    order: Sequence[str] = ()
    sizes: Sequence[SetSize] = ()
    words: WordCounts = field(default_factory=WordCounts)
    concepts: Sequence[Sequence[str]] = ()


def read_facts(config: RunConfig, root: Path, dataset: DatasetConfig | None = None) -> CardFacts:
    """Read ledger, indexes and workspace; nothing is written. Raises LedgerError, ChunkError."""
    run_dir, order = RunDir(root), set_order(dataset)
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir, epochs=epochs_of(config))
    counts = campaign_counts(campaign, run_dir)
    is_concepts = has_concepts(campaign)
    known = {chunk.info.name: chunk for chunk in list_chunks(Workspace(config.data.workspace).chunks)}
    for name in campaign.names:  # trained, and deleted from the workspace since
        copy = run_dir.started_chunk(name, check_shards=False) if name not in known else None
        known.update({name: copy} if copy is not None else {})
    there = [known[name] for name in sorted(known) if not known[name].info.is_combined]
    common = Counter(known[name].info.num_samples for name in campaign.names if name in known).most_common(1)
    return CardFacts(
        run_dir=root,
        run_json=run_dir.read_run_json(),
        totals=totals(campaign.lines),
        times=device_times(campaign.lines),
        chunks=chunk_status(campaign, order=order),
        images=dataset_rows(campaign, counts),
        chunk_size=common[0][0] if common else None,
        order=order,
        sizes=[] if is_concepts else set_sizes(there, order=order),
        words=WordCounts() if is_concepts else count_words(there, closed_groups(dataset)),
        concepts=[concept_table(campaign, run_dir), stage_table(campaign, counts)] if is_concepts else [],
    )


def render_card(
    config: RunConfig,
    facts: CardFacts,
    *,
    notes: Notes | None = None,
    dataset: DatasetConfig | None = None,
    repository: str | None = None,
) -> str:
    """Return the card's text; same facts, same text. repository: hub id of the weights, default `save.hub_prior`.

    Raises ConfigError when the licence is not said.
    """
    require_licence(config.save)
    notes = notes or Notes()
    repository = repository or config.save.hub_prior or HERE
    blocks = [
        [*front_matter(config), f"# {notes.title or config.name}", *(notes.opening or _opening(config))],
        ["# Release Notes", *(notes.sections.get("Release Notes") or _release(config, facts))],
        ui_guides(config, repository=repository, given=notes.sections),
        code_example(config, repository=repository, family=_family(config)),
        _status(facts),
        _dataset(facts, dataset, notes),
        tag_sections(facts.words, dataset, is_shuffled=config.caption.shuffle),
        parameter_lines(config, facts.run_json, run_dir=facts.run_dir),
        _limitations(config, facts, notes),
        ["## License", *(notes.sections.get("License") or _licence(config))],
    ]
    return "\n\n".join("\n".join(lines).strip("\n") for lines in blocks if lines) + "\n"


def _family(config: RunConfig) -> Any:
    return "sd1" if config.recipe_name == "stage_c" else family_of_model(config.of_dreambooth.model)[0]


def _opening(config: RunConfig) -> list[str]:
    what = "Stable Cascade stage C" if config.recipe_name == "stage_c" else "Stable Diffusion"
    return [f"{'Adapters for' if is_of_adapters(config) else 'Finetune of'} {what}."]


def _release(config: RunConfig, facts: CardFacts) -> list[str]:
    sums = facts.totals
    lines = [
        f"Weights of global step {dotted(sums.global_step)}: {dotted(sums.images_seen)} images seen in "
        f"{dotted(sums.applied_updates)} updates."
    ]
    if config.ema.enabled:
        lines.append("They are the running average of those that were trained.")
    return lines


def _status(facts: CardFacts) -> list[str]:
    lines = ["## Training Status:", *hours_lines(facts.times), ""]
    if facts.concepts:
        concepts, stages = facts.concepts
        return [*lines, *concepts, "", "Images shown, repeats and epochs counted:", "", *stages]
    lines += [*chunk_table(facts.chunks), ""]
    if facts.chunk_size is not None:
        lines += [f"**Note**: chunks starts from 0 and there are {facts.chunk_size} images per chunk", ""]
    return [*lines, *image_table(facts.images, order=facts.order)]


def _dataset(facts: CardFacts, dataset: DatasetConfig | None, notes: Notes) -> list[str]:
    given = [*notes.sections.get("Dataset", ())]
    if not facts.sizes:
        return ["## Dataset:", *given] if given else []
    lines = ["## Dataset:", *given, *_captioners(dataset)]
    return [*lines, "", *size_table(facts.sizes), *size_notes(facts.words, dataset)]


def _captioners(dataset: DatasetConfig | None) -> list[str]:
    models = dataset.annotate.get("models", {}) if dataset is not None else {}
    used = [str(one["model"]) for one in models.values() if "tagger" in one.get("kind", "") and one.get("model")]
    return [f"**Model used for captioning**: {', '.join(used)}"] if used else []


def _limitations(config: RunConfig, facts: CardFacts, notes: Notes) -> list[str]:
    bias, limits = (list(notes.sections.get(name, ())) for name in ("Bias", "Limitations"))
    remaining = sum(one.num_remaining for one in facts.chunks)
    if not limits:
        still = [f"- Still in active training: {dotted(remaining)} chunks remain."] if remaining else []
        limits = [*still, *_known_limits(config)]
    lines = ["## Limitations and Bias"]
    lines += ["### Bias", *bias] if bias else []
    return [*lines, "### Limitations", *limits]


def _known_limits(config: RunConfig) -> list[str]:
    tokens = config.recipe.max_tokens
    lines = [f"- Trained with prompts of at most {tokens} tokens; what stands behind them was not seen in training."]
    if not config.trains_in_text_encoder:
        lines.append("- The text encoder is that of the base model: words that it does not know stay weak.")
    if config.recipe_name == "stage_c":
        lines.append("- Small details, such as far faces and hands, depend on stage B, which was not trained.")
    return lines


def _licence(config: RunConfig) -> list[str]:
    card = config.save.model_card
    name = card.get("license_name") or card["license"]
    link = card.get("license_link")
    lines = [f"[{name}]({link})" if link else str(name)]
    others = [path.name for path in config.save.licence_files if path.name != link]
    return lines + ([f"See also {', '.join(f'[{one}]({one})' for one in others)}."] if others else [])
