"""Cases of a test of which the first run by default, and all of them with the slow tests."""

import pytest


def after(first, cases):
    """The cases, of which all but the ``first`` few are slow; each is a value or a tuple of values."""
    late = lambda k: () if k < first else (pytest.mark.slow,)
    values = lambda case: case if isinstance(case, tuple) else (case,)
    return [pytest.param(*values(case), marks=late(k)) for k, case in enumerate(cases)]
