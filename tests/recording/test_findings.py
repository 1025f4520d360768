from __future__ import annotations

import pytest

from fedsim.recording.findings import REPLAY, STATE, WHOLE_RUN, Findings, Place

ROLL = {1: frozenset({1, 3, 7}), 2: frozenset({1, 3, 7}), 3: frozenset({3}), 4: frozenset({3, 8})}


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([WHOLE_RUN], "why"),
        ([(3, None), (1, None), (2, None), (9, None)], "why (rounds 1 to 3, 9)"),
        ([(r, c) for r in (1, 2) for c in (1, 3, 7)], "why (all clients of rounds 1, 2)"),
        (
            [(1, 3), (2, 3), (3, 3), (4, 3), (2, 7)],
            "why (client 3 of rounds 1 to 4; client 7 of round 2)",
        ),
        ([(1, 1), (1, 3), (2, 1), (2, 3)], "why (clients 1, 3 of rounds 1, 2)"),
        ([(1, 1), (1, 3), (1, 7), (2, 3)], "why (all clients of round 1; client 3 of round 2)"),
        (
            [(0, 2 * n) for n in range(4000)],
            "why (clients 0, 2, 4, 6, 8, 10, 12, and 3,993 more of round 0)",
        ),
    ],
)
def test_places_of_one_reason_are_one_short_line(places: list[Place], said: str) -> None:
    findings = Findings()
    findings.roll.update(ROLL)
    for place in [*places, *places]:
        findings.leave(REPLAY, "why", at=place)
    assert findings.checks[REPLAY].unproven == [said]


def test_places_that_have_nothing_in_common_are_counted() -> None:
    findings = Findings()
    for number in range(1000):
        findings.leave(REPLAY, "why", at=(number, 5 * number))
    (line,) = findings.checks[REPLAY].unproven
    assert line.startswith("why (client 0 of round 0; client 5 of round 1; client 10 of round 2; ")
    assert line.endswith("client 20 of round 4; and 995 more)")


def test_what_something_else_proves_is_no_longer_told_whenever_it_does() -> None:
    findings = Findings()
    findings.settle(REPLAY, "why", at=(1, 3))
    for client in (1, 3, 7):
        findings.leave(REPLAY, "why", at=(1, client), steps=4)
    for step in (0, 2, 2):
        findings.settle(REPLAY, "why", at=(1, 7), step=step)
    assert findings.checks[REPLAY].unproven == ["why (6 of 12 steps; clients 1, 7 of round 1)"]
    for step in (1, 3):
        findings.settle(REPLAY, "why", at=(1, 7), step=step)
    findings.settle(REPLAY, "why", at=(1, 1))
    assert findings.checks[REPLAY].reasons == []
    # Nobody left what is settled here.
    findings.settle(REPLAY, "another", at=(1, 7))
    assert findings.checks[REPLAY].unproven == []


def test_what_threads_tell_stands_in_one_order_after_what_was_told_before() -> None:
    found = Findings()
    found.violate(STATE, "z, told before")
    found.leave(STATE, "z, left before", at=(1, None))
    with found.in_one_order():
        for name in ("c", "a", "b"):
            found.violate(STATE, name)
            found.leave(STATE, name, at=(1, None))
    assert found.checks[STATE].violations == ["z, told before", "a", "b", "c"]
    assert found.checks[STATE].reasons == ["z, left before", "a", "b", "c"]
