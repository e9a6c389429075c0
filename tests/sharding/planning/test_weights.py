"""Which rules apply to a picture, which of them decides, and what a change of rules costs."""

import pyarrow as pa
import pytest

from sharding.config import ConfigError, WeightRule
from sharding.planning.weights import columns_needed, weigh
from sharding.schema import MANIFEST

RECORDS = pa.Table.from_pylist(
    [
        dict.fromkeys(MANIFEST.names) | facts
        for facts in (
            {"source": "a", "dataset": "d", "tags_general": ["sky", "blue_sky"], "rating": "general"},
            {"source": "a", "dataset": "e", "tags_artist": ["ann"], "rating": "explicit",
             "custom": [("concept", "miku"), ("artist_name", "ann")]},
            {"source": "b", "dataset": "d", "tags_general": [], "rating": ""},
        )
    ],
    schema=MANIFEST,
)  # fmt: skip


def repeats(*rules) -> list[int]:
    return weigh(RECORDS, [WeightRule(**rule) for rule in rules]).repeats.tolist()


@pytest.mark.parametrize(
    ("condition", "applies"),
    [
        ({}, [2, 2, 2]),
        ({"source": "a"}, [2, 2, 1]),
        ({"dataset": "d"}, [2, 1, 2]),
        ({"tags": ["sky"]}, [2, 1, 1]),
        ({"tags": ["blue"]}, [1, 1, 1]),
        ({"tags": ["ann", "blue_sky"]}, [2, 2, 1]),
        ({"ratings": ["general", "explicit"]}, [2, 2, 1]),
        ({"custom": {"concept": "miku"}}, [1, 2, 1]),
        ({"custom": {"concept": "miku", "artist_name": "bob"}}, [1, 1, 1]),
        ({"source": "a", "dataset": "d"}, [2, 1, 1]),
    ],
)
def test_every_condition_that_is_given_must_hold(condition, applies):
    assert repeats(condition | {"repeats": 2}) == applies
    assert repeats(condition | {"loss_weight": 2.0}) == [1, 1, 1]


def test_the_last_rule_that_sets_a_value_decides_about_that_value():
    rules = [
        WeightRule(repeats=2, loss_weight=0.5),
        WeightRule(source="a", repeats=3),
        WeightRule(tags=("ann",), loss_weight=4),
    ]

    weights = weigh(RECORDS, rules)

    assert weights.repeats.tolist() == [3, 3, 2]
    assert weights.loss_weight.tolist() == [0.5, 4.0, 0.5]


def test_only_the_columns_that_rules_ask_for_are_read():
    assert columns_needed([WeightRule(source="a", repeats=2)]) == []
    assert columns_needed([WeightRule(ratings=("general",), repeats=2)]) == ["rating"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"source": "photos"}, "sets neither repeats nor loss_weight"),
        ({"repeats": 0}, "greater than or equal to 1"),
        ({"loss_weight": 0}, "greater than 0"),
        ({"tags": ["long hair"], "repeats": 2}, "underscore form: 'long hair' is not, 'long_hair' is"),
        ({"source": "phots", "repeats": 2}, r"plan\.weights\.0\.source: there is no 'phots'; there are photos"),
        ({"dataset": "newst", "repeats": 2}, r"plan\.weights\.0\.dataset: there is no 'newst'; there are photos"),
        ({"sauce": "x", "repeats": 2}, "unknown key; known here: custom, dataset"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(make_config, rule, message):
    with pytest.raises(ConfigError, match=message):
        make_config(plan={"weights": [rule]})
