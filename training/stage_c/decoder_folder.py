"""The folder of a StableCascadeDecoderPipeline, copied from a published one: stage B, stage A, their text encoder.

Every component's files are copied byte for byte, never built from class defaults: PaellaVQModel's default scale, for
one, is not stage A's. Two things are written: README.md, whose `prior:` leads StableCascadeCombinedPipeline to the
exported prior, and in model_index.json the place of PaellaVQModel, which moved in diffusers 0.38.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharding.files import replacing, write_json
from training.stage_c.model_card import read_front_matter, write_model_card
from training.stage_c.prior_folder import MODEL_INDEX

logger = logging.getLogger(__name__)

NEEDED = ("decoder", "vqgan", "scheduler")
VQGAN_LIBRARY = "diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model"
"""Where diffusers 0.38 and later find PaellaVQModel without being told to trust anything."""
OLD_VQGAN_LIBRARY = "wuerstchen"
"""Where diffusers 0.35 to 0.37 do; so it stands in the published folder."""


def find_decoder(path_or_id: str | Path) -> Path:
    """Return the folder of a decoder pipeline, fetched when it is a hub id. Raises FileNotFoundError."""
    path = Path(path_or_id)
    if not path.is_dir():
        if path.is_absolute() or len(path.parts) != 2:
            raise FileNotFoundError(f"decoder {path}: no such folder; give a decoder pipeline's or a hub id owner/name")
        path = _fetch(path.as_posix())
    if missing := [name for name in (MODEL_INDEX, *NEEDED) if not (path / name).exists()]:
        raise FileNotFoundError(f"{path}: not a decoder pipeline, {' and '.join(missing)} missing")
    return path


def copy_decoder(
    base: str | Path,
    folder: Path,
    *,
    title: str,
    name: str,
    prior: str,
    front: Mapping[str, str | Sequence[str]],
    for_old_diffusers: bool = False,
) -> Path:
    """Copy a decoder pipeline to `folder` and link it with a prior; return the folder.

    base: a folder or hub id. name: path or hub id of the copy, for those who load it. prior: the same of the prior.
    front: more front matter, over the base's.
    for_old_diffusers: 0.35 to 0.37 can load it, and later ones cannot; else the other way round.

    Raises FileNotFoundError, ValueError when the base is the folder itself or not a Stable Cascade decoder.
    """
    source = find_decoder(base)
    if source.resolve() == folder.resolve():
        raise ValueError(f"{folder}: is the decoder to copy from; export to another folder")
    index = json.loads((source / MODEL_INDEX).read_text("utf-8"))
    if "PaellaVQModel" not in (index.get("vqgan") or []):
        raise ValueError(f"{source / MODEL_INDEX}: has no PaellaVQModel as vqgan; this is not a Stable Cascade decoder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_INDEX).unlink(missing_ok=True)
    for component in components(index):
        _copy_folder(source / component, folder / component)
    for licence in sorted(source.glob("LICEN[CS]E*")):
        _copy_file(licence, folder / licence.name)
    write_model_card(
        folder / "README.md",
        title=title,
        front={**read_front_matter(source / "README.md"), **front, "prior": [prior]},
        facts=[f"stages B and A, copied unchanged from {base}", f"stage C: {prior}", _versions(for_old_diffusers)],
        decoder=name,
    )
    library = OLD_VQGAN_LIBRARY if for_old_diffusers else VQGAN_LIBRARY
    write_json(folder / MODEL_INDEX, {**index, "vqgan": [library, "PaellaVQModel"]})
    return folder


def components(index: Mapping[str, Any]) -> list[str]:
    """Return the subfolders that a model_index.json speaks of."""
    return [name for name, value in sorted(index.items()) if isinstance(value, list) and value[0] is not None]


def _versions(for_old_diffusers: bool) -> str:
    if for_old_diffusers:
        return "for diffusers 0.35 to 0.37"
    return f'for diffusers 0.38 and later; before, write "{OLD_VQGAN_LIBRARY}" as library of vqgan in {MODEL_INDEX}'


def _copy_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            _copy_file(path, target / path.relative_to(source))


def _copy_file(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def _fetch(repository: str) -> Path:
    """Fetch model_index.json and what it names; published repositories hold 20 GB of other files beside."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        index = json.loads(Path(hf_hub_download(repository, MODEL_INDEX)).read_text("utf-8"))
        patterns = [f"{component}/*" for component in components(index)]
        return Path(snapshot_download(repository, allow_patterns=[MODEL_INDEX, "README.md", "LICEN*", *patterns]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"decoder {repository!r}: neither a local folder nor a reachable hub id ({error}); download it first"
        ) from error
