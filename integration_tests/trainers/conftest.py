"""Makes many small training runs quick."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def imported_modules_are_no_garbage() -> None:
    """Every run begins with a full garbage collection by accelerate, which would look through all that is imported."""
    gc.collect()
    gc.freeze()
