"""`make chaos`, its short version: `refine` on two nodes under faults that a seed draws."""

import pytest

from jobs.chaos.schedule import KILLED, STOPPED, Fault, Tally, play
from jobs.chaos.watch import Books
from tests.conftest import copy_run
from tests.test_loop import forget_refinement

BALANCED = Books(5, 5, (), (), (), ())


def test_a_tally_is_right_only_if_all_recovered_all_was_explained_and_the_books_balance():
    good = Fault("kill", "driver", recovered=True)
    assert Tally([good], BALANCED).right
    assert not Tally([], BALANCED).right and not Tally([good]).right
    assert not Tally([good, Fault("stop")], BALANCED).right
    assert not Tally([Fault("stop", recovered=True, explained=False)], BALANCED).right
    assert not Tally([good], Books(5, 4, ("x",), (), (), ())).right
    assert set(STOPPED) == set(KILLED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_refine_survives_a_drawn_schedule(finished_run, tmp_path, seed):
    run = copy_run(finished_run, tmp_path)
    forget_refinement(run)
    tally = play(run, tmp_path / "work", minutes=3.0, seed=seed)
    assert tally.right, tally
    assert len({fault.kind for fault in tally.faults}) >= 3
