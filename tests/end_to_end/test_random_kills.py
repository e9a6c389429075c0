"""A seeded handful of the bench's random kills; `python -m scripts.bench kill --full` makes 200."""

import pytest

from scripts.bench.kill import measure

pytestmark = pytest.mark.slow


def test_runs_that_are_killed_at_random_end_as_if_nobody_had_disturbed_them(tmp_path):
    account = measure(tmp_path, num_kills=4, seed=11)

    assert account.kills.total() >= 4
    assert account.problems == []
