"""The tests of models spend their time in the compiler."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    """All but those of test_parity.py run programs that are compiled quickly rather than well."""
