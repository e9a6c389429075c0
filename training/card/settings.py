"""Front matter, licence, and how it was trained: settings and command, as the run has them."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from sharding.config import ConfigError
from training.config import RunConfig
from training.config.saving import SaveConfig
from training.frozen_config import to_toml

_FIRST = ("license", "license_name", "license_link")


def require_licence(save: SaveConfig) -> None:
    """Raise ConfigError when the licence is not said, or a licence file that the card links to is not in exports."""
    card = save.model_card
    if not card.get("license"):
        raise ConfigError(
            'save.model_card.license: missing; a model card needs one, such as license = "openrail++" in '
            '[save.model_card], or license = "other" with license_name and license_link'
        )
    if card["license"] == "other":
        for key in ("license_name", "license_link"):
            if not card.get(key):
                raise ConfigError(f'save.model_card.{key}: missing; license = "other" needs it')
    link = str(card.get("license_link", ""))
    names = [path.name for path in save.licence_files]
    if link and "://" not in link and link not in names:
        raise ConfigError(
            f"save.model_card.license_link: {link!r} is a file that no export has; name it in save.licence_files "
            f"(there: {', '.join(names) or 'none'}), or give a web address"
        )
    for path in save.licence_files:
        if not path.is_file():
            raise FileNotFoundError(f"save.licence_files: {path}: no such file")


def is_of_adapters(config: RunConfig) -> bool:
    """Tell whether exports hold adapters: not where they are whole weights alone, with the adapters in them."""
    return config.lora is not None and set(config.lora.formats) != {"merged"}


def front_matter(config: RunConfig) -> list[str]:
    """Return the lines between which the hub and diffusers read. A prior of stage C names its decoder."""
    from huggingface_hub import CardData

    card = config.save.model_card
    values: dict[str, Any] = {"pipeline_tag": "text-to-image"}
    values |= {key: _plain(card[key]) for key in _FIRST if card.get(key)}
    if config.recipe_name == "dreambooth" or is_of_adapters(config):
        values["library_name"] = "diffusers"
    values |= {key: _plain(value) for key, value in card.items() if key not in _FIRST}
    if config.recipe_name == "stage_c" and config.save.hub_decoder:
        values["decoder"] = [config.save.hub_decoder]
    return ["---", *CardData(**values).to_yaml().splitlines(), "---"]


def _plain(value: str | Sequence[str]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def base_model(config: RunConfig) -> str:
    """Return what training started from: a hub id, or the name of a file or folder."""
    source = config.of_stage_c.network if config.recipe_name == "stage_c" else config.of_dreambooth.model
    is_hub_id = source.count("/") == 1 and not source.startswith((".", "/")) and not PurePath(source).suffix
    return source if is_hub_id and not Path(source).exists() else PurePath(source).name


def parameter_lines(config: RunConfig, facts: Mapping[str, Any], *, run_dir: Path) -> list[str]:
    """Return the section `## Training Parameters:`. facts: run.json; a run of earlier versions has no command there."""
    try:
        software = f"chunkline {version('chunkline')}"
    except PackageNotFoundError:
        software = "chunkline"
    if facts.get("torch"):
        software += f", torch {facts['torch']}"
    command = facts.get("command") or f"python -m training run run.toml --run-dir {run_dir.name}"
    changed = config.model_dump(mode="json", exclude_defaults=True, exclude={"trackers": {"webhook"}})
    return [
        "## Training Parameters:",
        f"**Software used**: {software}  ",
        f"**Base model**: {base_model(config)}",
        "### Command:",
        "```shell",
        command,
        "```",
        "run.toml, without what is at its default:",
        "```toml",
        *to_toml(changed).splitlines(),
        "```",
    ]
