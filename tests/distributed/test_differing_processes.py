"""Two processes that were given different things: both are told which, before anything is computed."""

import pytest
from differing_worker import OTHERS
from launching import launch, result

pytestmark = pytest.mark.multi_rank


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("differing")
    launch("differing_worker.py", [], folder)
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_processes_that_differ_are_refused_on_both_by_name(launched, name):
    for rank in range(2):
        found = result(launched, name, rank)
        assert (found["message"] or "").startswith("ConfigError: The processes differ in ")
        assert name in found["message"].partition(":")[2].partition(".")[0]
        assert found["seconds"] < 10
        assert found["adapter_as_before"]
