"""Numbers as people read them."""

import pytest

from megalong.runtime.amounts import amount, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45s"), (130, "2m10s"), (11100, "3h05m"), (187200, "2d04h"), (59.7, "1m00s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(987, "987"), (12345, "12.3K"), (4.2e6, "4.20M"), (1.05e9, "1.05B")])
def test_amounts(value, text):
    assert amount(value) == text
