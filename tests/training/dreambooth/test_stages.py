"""Stages: chunks with settings of their own."""

import pytest

from sharding.chunk import ChunkError
from tests.training.dreambooth.toy_recipe import sd_config
from training.config import RunConfig
from training.stages import epochs_of, require_packed, stage_config, stages_of, unread_epochs

BOTH = ["unet", "text_encoder"]
TABLES = {"data": {"workspace": "none", "epochs": 9}, "optimizer": {"learning_rate": 1e-6}}
WIKI = [
    {"name": "with-text", "epochs": 35, "learning_rate": 2e-6, "train": BOTH},
    {"name": "without-text", "epochs": 65, "learning_rate": 1e-6},
]


def test_the_wikis_two_stages_are_two_chunks():
    config = sd_config("none", tables=TABLES, concepts="c.toml", stages=WIKI)

    first, second = (stage_config(config, one.chunk) for one in stages_of(config))

    assert [(one.data.epochs, one.optimizer.learning_rate) for one in (first, second)] == [(35, 2e-6), (65, 1e-6)]
    assert [one.dreambooth.train for one in (first, second)] == [("unet", "text_encoder"), ("unet",)]
    # Both know that the text encoder is trained at some time: its weights are in the state of each.
    assert [one.dreambooth.trained_text for one in (first, second)] == [("text_encoder",)] * 2
    assert epochs_of(config)("concepts/02-without-text") == 65
    assert epochs_of(config)("combined/0000") == 9


def test_a_stages_settings_are_valid_settings_and_have_the_same_stages():
    config = sd_config("none", tables=TABLES, concepts="c.toml", train=BOTH, text_encoder_ratio=1 / 3)

    for stage in stages_of(config):
        own = stage_config(config, stage.chunk)
        assert RunConfig.model_validate(own.model_dump()) == own
        assert stage_config(own, stage.chunk) == own
        assert [one.chunk for one in stages_of(own)] == [one.chunk for one in stages_of(config)]


def test_runs_on_other_chunks_have_no_stages():
    config = sd_config("none", tables=TABLES, train=BOTH)

    assert stages_of(config) == ()
    assert stage_config(config, "combined/0000") is config


def test_body_parts_first_then_whole_characters():
    stages = [
        {"name": "parts", "epochs": 10, "concepts": ["hands", "feet"], "prior_weight": 0.0},
        {"name": "whole", "epochs": 70, "concepts": ["rin"]},
    ]
    config = sd_config("none", concepts="c.toml", prior_weight=0.3, stages=stages)

    assert [one.concepts for one in stages_of(config)] == [("hands", "feet"), ("rin",)]
    weights = [stage_config(config, one.chunk).dreambooth.prior_weight for one in stages_of(config)]
    assert weights == [0.0, 0.3]


def test_chunks_that_are_not_the_stages_are_refused():
    config = sd_config("none", tables=TABLES, concepts="c.toml", stages=WIKI)
    packed = [one.chunk for one in stages_of(config)]

    require_packed(config, packed)
    for names in (packed[:1], packed[::-1], [*packed, "concepts/03-more"]):
        with pytest.raises(ChunkError, match="pack-concepts"):
            require_packed(config, names)
    require_packed(sd_config("none", tables=TABLES), ["combined/0000"])


def test_epochs_that_stages_have_themselves_are_told():
    assert unread_epochs(sd_config("none", tables=TABLES, concepts="c.toml", stages=WIKI)) == [
        "data.epochs 9 is not read: each of dreambooth.stages has its own"
    ]
    assert unread_epochs(sd_config("none", tables=TABLES, concepts="c.toml")) == []
