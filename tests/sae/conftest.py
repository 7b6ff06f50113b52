"""The tests of dictionaries spend their time in the compiler."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    """All of them run programs that are compiled quickly rather than well."""
