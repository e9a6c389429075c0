"""The demo's random models, made once."""

import pytest

from scripts.demo_models.stage_c import make_stage_c_models


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    return make_stage_c_models(tmp_path_factory.mktemp("models"), seed=0)
