"""A workspace with one chunk, settings for it, and encoders that only count: no network is needed."""

import hashlib
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F

from sharding.chunk import open_chunk
from tests.training.chunks import encode, make_chunk, paint
from training.config import RunConfig
from training.latents import store, wanted

NAME = "newest/0000"
PART_SIZE = 5


@dataclass(frozen=True)
class Encoded:
    values: torch.Tensor
    broken: dict[int, str] = field(default_factory=dict)


class CountingEncoder:
    """Latents are means over 8 x 8 pixels. spoilt: mean colours below this get a value that nothing can hold."""

    name = "stage_c.effnet"

    def __init__(self, version="1", offset=0.0):
        self.version, self.offset, self.num_encoded = version, offset, 0

    def digests(self):
        return {self.name: hashlib.sha256(self.version.encode()).hexdigest()}

    def encode(self, images):
        self.num_encoded += len(images)
        return Encoded(F.avg_pool2d(images.float(), 8) + self.offset)


class CountingTextEncoder:
    """Two tensors per caption, of its length and letters."""

    num_encoded = 0

    def digests(self):
        return {"stage_c.text_encoder": "e" * 64, "stage_c.tokenizer": "t" * 64}

    def encode(self, captions):
        self.num_encoded += len(captions)
        letters = [[float(ord(letter)) for letter in f"{caption:12}"[:12]] for caption in captions]
        return torch.tensor(letters).reshape(-1, 4, 3), torch.tensor([[float(len(one))] for one in captions])


@pytest.fixture
def encoders(monkeypatch):
    """Put counting encoders in the place of the real ones; the dictionary may be changed."""
    own = {"image": CountingEncoder(), "text": CountingTextEncoder()}
    import training.latents.encode
    import training.recipes.encoders

    for module in (training.recipes.encoders, training.latents.encode):
        monkeypatch.setattr(module, "load_image_encoder", lambda config, device: own["image"])
        monkeypatch.setattr(module, "load_text_encoder", lambda config, device: own["text"])
    monkeypatch.setattr(wanted, "PART_SIZE", PART_SIZE)
    store._encoder_digests.cache_clear()
    yield own
    store._encoder_digests.cache_clear()


@pytest.fixture
def workspace(tmp_path):
    """Return a workspace with a chunk of 24 pictures; one cannot be read, one has a mask."""
    root = tmp_path / "workspace"
    mask = encode(paint(50, 240, 200).convert("L"), "PNG")
    make_chunk(root / "chunks" / "newest" / "0000", images={6: b"no picture"}, masks={3: mask})
    return root


@pytest.fixture
def chunk(workspace):
    return open_chunk(workspace / "chunks" / NAME)


@pytest.fixture
def make_config(workspace):
    """Return a function that makes settings; changes: {table: {key: value}}."""

    def make(**changes):
        values = {
            "name": "ahead", "seed": 5, "device": "cpu",
            "data": {"workspace": workspace, "chunks": ["newest/*"], "workers": 0, "max_broken_fraction": 0.2},
            "batch": {"batch_size": 6, "micro_batch_size": 3}, "buckets": {"resolution": [128, 128], "step": 32},
            "caption": {"shuffle": False}, "latents": {"use": True, "dtype": "fp32"},
            "stage_c": {"network": "none", "text_encoder": "none", "effnet": "none"},
        }  # fmt: skip
        for key, value in changes.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return RunConfig.model_validate(values)

    return make
