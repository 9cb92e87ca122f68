"""Messages between ranks carry values forward and gradients back, in one order on all ranks."""

from __future__ import annotations

import re

import pytest

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
MESSAGE = re.compile(r"(send|post|wait) (.*) (to|from) (\d)")


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize(
    ("cp", "passes", "dtype"),
    [(2, 1, "float32"), (4, 1, "float32"), (4, 1, "float64"), (4, 3, "float32")],
)
def test_gradients_cross_ranks(cp, passes, dtype, recompute, ranks):
    """Every lower rank sends to every higher one, three layers deep, in messages of two dtypes."""
    found = ranks.run("chain", cp=cp, passes=passes, dtype=dtype, recompute=recompute)[0]
    assert {"out", "x", "weight 2"} <= found.keys()
    for name, deviation in found.items():
        # the messages hold a part in float32
        assert deviation < TOLERANCE["float32"], name


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_both_ends_name_messages_in_the_same_order_and_backwards_in_the_opposite(recompute, ranks):
    found = ranks.run("order", cp=4, recompute=recompute)
    names = {answer["rank"]: answer["names"] for answer in found}
    seen = {
        (rank, verb, int(peer)): [
            m[2] for name in names[rank] if (m := MESSAGE.fullmatch(name)) and m[1] == verb
            and m[4] == peer
        ]
        for rank in range(4)
        for verb in ("send", "post")
        for peer in "0123"
    }  # fmt: skip
    for low in range(4):
        for high in range(low + 1, 4):
            forward = [f"{layer}/x" for layer in range(3)]
            backward = [f"grad/{layer}/x" for layer in (2, 1, 0)]
            assert seen[low, "send", high] == seen[high, "post", low] == forward
            assert seen[high, "send", low] == seen[low, "post", high] == backward
    # sends before receives, the nearest rank first; each receive is posted before it is waited for
    assert [n for n in names[1] if n.endswith(("2", "3", "0"))][:4] == [
        "send 0/x to 2", "send 0/x to 3", "post 0/x from 0", "wait 0/x from 0",
    ]  # fmt: skip
    # a held weight's gradient is there once all of its layer's messages have gone
    for answer in names.values():
        for layer in range(3):
            last = max(i for i, n in enumerate(answer) if f"grad/{layer}/x" in n)
            assert answer.index(f"weight {layer}") > last


def test_a_pass_without_gradients_keeps_nothing(ranks):
    for answer in ranks.run("without_gradients", cp=4):
        assert answer == {"graph": False, "empty": True, "gone": True}


def test_what_is_sent_may_be_changed_at_once(ranks):
    found = ranks.run("buffers_are_copies", cp=4)
    assert [len(answer) for answer in found] == [0, 1, 2, 3]
    assert all(value == 0 for answer in found for value in answer.values())


def test_wrong_uses_are_refused(ranks):
    found = ranks.run("refusals")[0]
    assert "hold/a is exchanged twice in one pass; use Exchange(tape=True)" in found["twice"]
    assert "requires gradients" not in found["anchor"]
    assert "its anchor does not; give an anchor that does" in found["anchor"]
