"""A short form of `make soak`."""

import sys
from collections.abc import Iterator

import pytest

from integration_tests.serving.soak import KINDS, soak


@pytest.fixture(autouse=True)
def often_switched_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.filterwarnings("ignore")
def test_calls_of_four_threads_give_each_row_its_own_and_leave_nothing_behind() -> None:
    found = soak(seed=1, calls=160, rounds=2)
    assert not found["reports"]
    assert found["calls"].keys() == KINDS.keys() and sum(found["calls"].values()) == 160
    assert found["raised"] > 10
    assert len(set(found["tensor_bytes"])) == 1
