"""Where latents and text outputs lie: by encoder and rule, then by chunk, then by what is wanted of it.

    WORKSPACE/latents/latents-<encoder>-<rule>/encoder.json                     whose digests and which settings
                                               newest/0004/<wanted>/part-…      see `parts`
                      text-<encoder>-<rule>/…

Nothing is found by name alone: names are digests, so a changed encoder, setting or picture is another folder, and what
is not there is missing, never stale. No torch but where an encoder has to be hashed.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from sharding.files import digest_of, write_json
from sharding.schema import Workspace
from training.config import RunConfig
from training.latents.parts import FORMAT, LatentsError, problems_of
from training.plans import bucket_settings

logger = logging.getLogger(__name__)

Kind = Literal["latents", "text"]
ENCODER_JSON = "encoder.json"
_LENGTH = 12
_RESIZED_BY = "decode at DCT scale, Pillow HAMMING"
"""How pixels get to their size: names the way, so that another one is another rule (`training.loading.pixels`)."""


@dataclass(frozen=True)
class Store:
    """Everything that one encoder gives under one rule. digests: of the encoder, by config key."""

    root: Path
    kind: Kind
    rule: Mapping[str, Any]
    digests: Mapping[str, str]

    @property
    def dtype(self) -> str:
        return str(self.rule["dtype"])

    @property
    def folder(self) -> Path:
        return self.root / f"{self.kind}-{_short(self.digests)}-{_short(self.rule)}"

    def chunk_folder(self, chunk: str, wanted_digest: str) -> Path:
        """Return where the parts of a chunk lie."""
        return self.folder / chunk / wanted_digest[:_LENGTH]

    def describe(self) -> None:
        """Write encoder.json, for people and for training without the encoder's file."""
        path = self.folder / ENCODER_JSON
        if not path.exists():
            write_json(path, {"format": FORMAT, "kind": self.kind, "encoder": dict(self.digests), "rule": self.rule})


def root_of(config: RunConfig) -> Path:
    """Return the folder of all latents and text outputs of a run."""
    return config.latents.folder or Workspace(config.data.workspace).root / "latents"


def latent_rule(config: RunConfig, *, crop: str) -> dict[str, Any]:
    """Return what decides a latent besides its picture and the encoder, for JSON."""
    from training.recipes.encoders import image_rule

    buckets = asdict(bucket_settings(config))
    rule = {"resized_by": _RESIZED_BY, "buckets": buckets, "crop": crop, "dtype": config.latents.dtype}
    return {**image_rule(config), **rule}


def text_rule(config: RunConfig) -> dict[str, Any]:
    """Return what decides a text output besides its caption and the encoder, for JSON."""
    from training.recipes.encoders import caption_rule

    return {**caption_rule(config), "autocast": config.precision.autocast, "dtype": config.latents.dtype}


def latent_store(config: RunConfig, *, crop: str) -> Store:
    """Return the store of a run's latents. Raises as `encoder_digests`."""
    rule = latent_rule(config, crop=crop)
    return Store(root_of(config), "latents", rule, encoder_digests(config, "latents"))


def text_store(config: RunConfig) -> Store:
    """Return the store of a run's text outputs. Raises as `encoder_digests`."""
    return Store(root_of(config), "text", text_rule(config), encoder_digests(config, "text"))


def encoder_digests(config: RunConfig, kind: Kind) -> dict[str, str]:
    """Return the digests of the run's image or text encoder, by config key.

    The encoder is read and let go again; where its file is gone, the stores that its rule has left tell.
    Raises FileNotFoundError when there is none, LatentsError when they name several encoders, WeightsError for a
    damaged file.
    """
    return dict(_encoder_digests(config.model_dump_json(), kind))


@lru_cache(maxsize=8)
def _encoder_digests(config_json: str, kind: Kind) -> dict[str, str]:
    import torch

    from training.recipes.encoders import load_image_encoder, load_text_encoder

    config = RunConfig.model_validate_json(config_json)
    try:
        load = load_image_encoder if kind == "latents" else load_text_encoder
        return load(config, torch.device("cpu")).digests()
    except FileNotFoundError as error:
        return _left_digests(config, kind, error)


def _left_digests(config: RunConfig, kind: Kind, missing: FileNotFoundError) -> dict[str, str]:
    rule = latent_rule(config, crop=config.data.crop) if kind == "latents" else text_rule(config)
    found = sorted(root_of(config).glob(f"{kind}-*-{_short(rule)}/{ENCODER_JSON}"))
    if not found:
        raise missing
    if len(found) > 1:
        raise LatentsError(
            f"{missing}; of its {kind} there are those of {len(found)} encoders in {root_of(config)}: give the one "
            "that is meant"
        ) from missing
    logger.info("%s; its digest is taken from %s", missing, found[0])
    digests: dict[str, str] = json.loads(found[0].read_text(encoding="utf-8"))["encoder"]
    return digests


def require_complete(store: Store, chunk: str, wanted_digest: str, *, num_parts: int) -> Path:
    """Return the folder of a chunk's parts. Raises LatentsError unless all are there; values are not looked at."""
    folder = store.chunk_folder(chunk, wanted_digest)
    problems = [found for number in range(num_parts) for found in problems_of(folder, number, with_data=False)[:1]]
    if not problems:
        return folder
    what = "latents" if store.kind == "latents" else "text outputs"
    option = " --text" if store.kind == "text" else ""
    raise LatentsError(
        f"chunk {chunk}: {len(problems)} of {num_parts} parts of its {what} are missing or damaged, first "
        f"{problems[0]}{_why(store, chunk, folder)}; run `python -m training encode-latents RUN.toml --chunk {chunk}"
        f"{option}` with this run's settings"
    )


def _why(store: Store, chunk: str, folder: Path) -> str:
    """Return what is there instead, for a message."""
    if folder.exists():
        return ""
    if (store.folder / chunk).is_dir():
        return " (what is there is of other pictures, sizes, flips or captions)"
    others = [path.parent.name for path in sorted(store.root.glob(f"{store.kind}-*/{ENCODER_JSON}"))]
    if others and store.folder.name not in others:
        return f" (there is {', '.join(others[:3])}: of another encoder or other settings, see its {ENCODER_JSON})"
    return ""


def _short(value: Mapping[str, Any]) -> str:
    return digest_of(dict(value))[:_LENGTH]
