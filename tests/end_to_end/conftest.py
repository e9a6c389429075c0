"""A tiny run on real pictures, see `scripts.tiny_run`, and one that nobody disturbed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.tiny_run import TinyRun, make_workspace, tiny_overrides
from sharding.schema import Workspace


@pytest.fixture(scope="session")
def real_workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    make_workspace(root, num_chunks=2)
    return root


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    from scripts.demo_models.stage_c import make_stage_c_models

    folder = tmp_path_factory.mktemp("models")
    make_stage_c_models(folder, seed=7)
    return folder


@pytest.fixture(scope="session")
def make_run(real_workspace, tiny_models) -> Callable[..., TinyRun]:
    """Return a function that gives a fresh TinyRun in a folder, with further `--set` overrides."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"

    def make(root: Path, *more: str) -> TinyRun:
        return TinyRun(root, [*tiny_overrides(real_workspace, tiny_models), *more])

    return make


@pytest.fixture(scope="session")
def uninterrupted(make_run, tmp_path_factory) -> TinyRun:
    """A run that nobody disturbed: what every other must equal."""
    run = make_run(tmp_path_factory.mktemp("uninterrupted") / "run")
    run.train_all()
    return run


@pytest.fixture(scope="module")
def with_held_out(real_workspace) -> Iterator[None]:
    """Set a copy of the first chunk aside for validation."""
    chunks = Workspace(real_workspace).chunks / "real"
    folder = chunks / "held-out"
    shutil.copytree(chunks / "0000", folder, ignore=shutil.ignore_patterns("trained-by-*"))
    path = folder / "chunk.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "real/held-out", "is_held_out": True}))
    yield
    shutil.rmtree(folder)
