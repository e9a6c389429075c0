"""The commands that do here what a kohya command did: pictures into chunks, a state taken over, the run. No torch."""

import shlex
from collections.abc import Iterator

from training.kohya.dreambooth_settings import CONCEPTS, packs_concepts
from training.kohya.flag_table import OF_THE_BRANCH
from training.kohya.given import Given
from training.kohya.run_settings import run_folder

_DATASET = "dataset.toml"


def following_commands(given: Given, *, workspace: str, chunks: str, run_toml: str) -> Iterator[str]:
    """Yield the commands in their order. run_toml: the settings' file."""
    if given.script not in OF_THE_BRANCH:
        yield from _of_dreambooth(given, workspace=workspace, chunks=chunks, run_toml=run_toml)
        return
    yield from _packed_chunks(given, workspace=workspace, chunks=chunks)
    if given.has("cache_latents", "cache_latents_to_disk"):
        yield _module("training", "encode-latents", run_toml)
    if given.value("resume"):
        run_dir = str(run_folder(given))
        yield _module("training", "import-state", given.value("resume"), run_toml, "--run-dir", run_dir)
    yield _run_command(given, run_toml)


def _of_dreambooth(given: Given, *, workspace: str, chunks: str, run_toml: str) -> Iterator[str]:
    source = given.value("dataset_config") or given.value("train_data_dir")
    if packs_concepts(given):
        if source:
            yield _module("training", "import-concepts", source, "--output", CONCEPTS)
            yield _module("training", "doctor", CONCEPTS)
        yield _module("training", "pack-concepts", run_toml)
    else:
        yield from _packed_chunks(given, workspace=workspace, chunks=chunks)
    if given.has("cache_latents", "cache_latents_to_disk"):
        yield _module("training", "encode-latents", run_toml)
    yield _run_command(given, run_toml)


def _packed_chunks(given: Given, *, workspace: str, chunks: str) -> Iterator[str]:
    if folder := given.value("train_data_dir") or (given.value("dataset_config") and "."):
        words = ["sharding", "import-kohya", folder, "--output", _DATASET, "--name", chunks.split("/")[0]]
        if given.value("dataset_config"):
            words += ["--dataset-config", given.value("dataset_config")]
        elif given.value("in_json"):
            words += ["--metadata", given.value("in_json")]
        yield _module(*words)
        yield _module("scripts.build_chunks", _DATASET, "--workspace", workspace)


def _run_command(given: Given, run_toml: str) -> str:
    processes = given.launcher.get("num_processes", 1)
    environment = [f"{name}={shlex.quote(value)}" for name, value in given.environment.items()]
    own = ["-m", "training", "run", run_toml, "--run-dir", str(run_folder(given))]
    words = ["python", *own]
    if processes > 1:
        count = str(processes)
        launcher = ["accelerate", "launch", "--config_file", "configs/accelerate/ddp.yaml", "--num_processes", count]
        words = [*launcher, *own, "--processes", count]
    return " ".join([*environment, shlex.join(words)])


def _module(*words: str) -> str:
    return shlex.join(["python", "-m", *words])
