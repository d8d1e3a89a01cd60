"""A short form of `make soak`."""

import pytest

from integration_tests.serving.soak import KINDS, soak


pytestmark = pytest.mark.usefixtures("often_switched_threads")


@pytest.mark.filterwarnings("ignore")
def test_calls_of_four_threads_give_each_row_its_own_and_leave_nothing_behind() -> None:
    found = soak(seed=1, calls=160, rounds=2)
    assert not found["reports"]
    assert found["calls"].keys() == KINDS.keys() and sum(found["calls"].values()) == 160
    assert found["raised"] > 10
    assert len(set(found["tensor_bytes"])) == 1
