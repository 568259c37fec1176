"""The line of tickets against the rule that it keeps, said plainly: a list that is searched."""

from __future__ import annotations

import random

import pytest

from cosmos_ray.rollout.line import Line


def searched(tickets: list[str], had: set[str], others: set[str]) -> str:
    for wanted in (lambda kind: kind in had, lambda kind: kind not in others):
        for ticket in tickets:
            if wanted(ticket[0]):
                return ticket
    return tickets[0]


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_gets_the_ticket_that_a_search_would_find(seed):
    rng, plain, line, made = random.Random(seed), [], Line(lambda ticket: ticket[0]), 0
    for _ in range(400):
        if rng.random() < 0.5 or not plain:
            ticket, made = f"{rng.choice('abcd')}{made}", made + 1
            if rng.random() < 0.2:
                plain.insert(0, ticket)
                line.put_back(ticket)
            else:
                plain.append(ticket)
                line.append(ticket)
        else:
            had, others = ({kind for kind in "abcd" if rng.random() < 0.3} for _ in range(2))
            ticket = line.next(had, others)
            assert ticket == searched(plain, had, others)
            if rng.random() < 0.8:
                line.take(ticket)
                plain.remove(ticket)
        assert len(line) == len(plain)


def test_an_empty_line_has_no_next_ticket():
    line = Line(str)
    line.append("x")
    line.clear()
    assert len(line) == 0
    with pytest.raises(IndexError):
        line.next((), ())
