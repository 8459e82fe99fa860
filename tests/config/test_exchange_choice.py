"""Which exchange a layout gets, and what is refused."""

import pytest

from megalong.config.exchange import choose_exchange
from megalong.errors import UserError


def chosen(wanted: str, ranks: int, tokens: int, heads: int, groups: int, size: int | None = None) -> tuple[str, int]:
    exchange = choose_exchange(wanted, size, ranks, tokens, heads, groups)
    return exchange.name, exchange.heads_size


def test_ultralong_is_a_ring() -> None:
    """Llama 3.1 8B (32 heads, 8 groups) at TP 8 has 4 heads and 1 group a rank; CP 4 at 1M and 16 at 4M tokens."""
    assert chosen("auto", 4, (1 << 20) // 4, 4, 1) == ("ring", 1)
    assert chosen("auto", 16, (1 << 22) // 16, 4, 1) == ("ring", 1)
    assert "overlap with compute" in choose_exchange("auto", None, 4, 1 << 18, 4, 1).reason


def test_short_shards_swap_heads_as_far_as_they_go_and_gather_where_they_do_not() -> None:
    assert chosen("auto", 4, 1024, 8, 2) == ("ulysses", 4)
    assert chosen("auto", 16, 1024, 4, 1) == ("ring_ulysses", 4)
    assert chosen("auto", 4, 1024, 3, 1) == ("all_gather", 1)
    assert chosen("auto", 1, 1024, 3, 1) == ("none", 1)


def test_what_is_asked_for_is_done() -> None:
    assert chosen("ring", 4, 64, 8, 8) == ("ring", 1)
    assert choose_exchange("all_gather", None, 4, 1 << 20, 8, 8).transport == "all_gather"
    assert chosen("ring_ulysses", 8, 64, 8, 4, 4) == ("ring_ulysses", 4)
    assert chosen("ring_ulysses", 8, 64, 8, 4) == ("ring_ulysses", 4)  # the largest below all ranks


@pytest.mark.parametrize(
    ("wanted", "size", "message"),
    [
        ("ulysses", None, "groups of 8 within 8 context-parallel ranks cannot share 4 query and 1 key heads .* ring"),
        ("ring_ulysses", 8, "write attention.ulysses_size 2 or 4"),
        ("ring_ulysses", 3, "write attention.ulysses_size 2 or 4"),
    ],
)
def test_heads_that_do_not_divide_are_refused(wanted: str, size: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_exchange(wanted, size, 8, 1024, 4, 1)


def test_key_heads_that_cannot_be_copied_are_not_spread() -> None:
    assert choose_exchange("auto", None, 4, 1024, 8, 2, copies_keys=False).heads_size == 2
    assert choose_exchange("auto", None, 4, 1024, 4, 1, copies_keys=False).name == "all_gather"
    with pytest.raises(UserError, match="cannot share 4 query and 1 key heads"):
        choose_exchange("ulysses", None, 4, 1024, 4, 1, copies_keys=False)
