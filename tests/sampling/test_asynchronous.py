"""Cohorts by the clock: what was played is held to a second look at every trip, and to rounds worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.sampling.asynchronous import buffered_cohort, deadline_cohort, with_clock
from jaxfed.sampling.clock import HOUR, Clock, constant_times, lognormal_times
from jaxfed.sampling.cohort import everyone_cohort, uniform_cohort

N = 60
ACTIVITY = np.random.default_rng(0).integers(1, 50, N)


def rounds(sampler, count, seed=0):
    """(ids, present, ages, end) of the first rounds; slots without a client left out."""
    out = []
    for t in range(count):
        ids, present = sampler.draw(seed, t)
        ages = sampler.ages(seed, t) if sampler.ages else np.zeros(len(ids), int)
        there = ids < N
        out.append((ids[there], present[there], ages[there], sampler.clock(seed, t)))
    return out


def test_a_round_without_a_deadline_lasts_until_the_slowest_has_come():
    clock, start = lognormal_times(N, ACTIVITY), 0.0
    for t, (ids, present, _, end) in enumerate(rounds(deadline_cohort(N, clock, 8), 5)):
        assert len(ids) == 8
        assert present.all()
        assert end - start == pytest.approx(clock.trip(0, ids, np.full(8, t)).max())
        start = end


def test_over_selection_takes_the_first_to_come():
    clock, start = lognormal_times(N, ACTIVITY), 0.0
    for t, (ids, present, _, end) in enumerate(rounds(deadline_cohort(N, clock, 8, over=1.5), 5)):
        trips = clock.trip(0, ids, np.full(12, t))
        assert sorted(ids[present]) == sorted(ids[np.argsort(trips)[:8]])
        assert end - start == pytest.approx(np.sort(trips)[7])
        start = end


def test_who_misses_the_deadline_is_dropped():
    clock, start = lognormal_times(N, ACTIVITY), 0.0
    shares = []
    for t, (ids, present, _, end) in enumerate(rounds(deadline_cohort(N, clock, 8, seconds=12.0), 20)):
        trips = clock.trip(0, ids, np.full(8, t))
        assert (present == (trips <= 12)).all()
        assert end - start == pytest.approx(min(12, trips.max()) if present.all() else 12)
        start, _ = end, shares.append(present.mean())
    assert 0.1 < np.mean(shares) < 0.95


def test_drop_outs_do_not_report_and_are_waited_for():
    clock = constant_times(N, np.ones(N))
    seen = rounds(deadline_cohort(N, clock, 20, dropout=0.3), 100)
    gone = 1 - np.mean([present.mean() for _, present, _, _ in seen])
    assert abs(gone - 0.3) < 5 * np.sqrt(0.21 / 2000)
    assert seen[-1][3] == pytest.approx(100 * clock.trip(0, np.array([0]), np.array([0]))[0])


def awake_at(hours):
    return tuple(1.0 if hour in hours else 0.0 for hour in range(24))


@pytest.mark.parametrize("make", [lambda c: deadline_cohort(N, c, 5), lambda c: buffered_cohort(N, c, 5, 10)])
def test_nobody_is_asked_asleep(make):
    """With trips of two hours and everyone awake from 3 to 4 alone, a round a day: the server waits."""
    clock = constant_times(N, np.ones(N), 7200.0, 0.0, 0.0, awake=awake_at({3}))
    ends = np.array([end for *_, end in rounds(make(clock), 6)])
    assert (ends % (24 * HOUR) >= 5 * HOUR).all()
    assert (ends % (24 * HOUR) < 6 * HOUR).all()
    assert ends[-1] >= 2 * 24 * HOUR
    never = Clock(clock.trip, lambda seed, time: np.zeros(N, bool))
    with pytest.raises(ValueError, match="nobody has been awake"):
        make(never).draw(0, 0)


def test_a_sampler_without_a_clock_is_timed_by_the_slowest_of_those_asked():
    clock, sampler = lognormal_times(N, ACTIVITY), uniform_cohort(N, 8, dropout=0.5)
    told, start = with_clock(sampler, clock, N), 0.0
    for t in range(5):
        assert all((a == b).all() for a, b in zip(told.draw(0, t), sampler.draw(0, t), strict=True))
        asked = told.draw(0, t)[0]
        assert told.clock(0, t) - start == pytest.approx(clock.trip(0, asked, np.full(8, t)).max())
        start = told.clock(0, t)
    with pytest.raises(ValueError, match="who is awake"):
        with_clock(everyone_cohort(N), constant_times(N, ACTIVITY, awake=(0.5,)), N)


def test_alike_and_all_at_once_a_buffer_is_a_synchronous_round():
    """Buffer = concurrency, one time for all: everybody comes with the model of the round."""
    for ids, present, ages, end in rounds(buffered_cohort(N, constant_times(N, np.ones(N), 1.0, 0.0, 2.0), 8, 8), 5)[
        :5
    ]:
        assert len(ids) == 8
        assert present.all()
        assert not ages.any()
        assert end % 3 == 0


BY_HAND = {  # (size, concurrency): ages and ends of six rounds, all trips taking a second
    (1, 1): ([[0], [0], [0], [0], [0], [0]], [1, 2, 3, 4, 5, 6]),
    (1, 2): ([[0], [1], [0], [1], [0], [1]], [1, 1, 2, 2, 3, 3]),  # two come at a time, the second a round late
    (2, 4): ([[0, 0], [1, 1], [0, 0], [1, 1], [0, 0], [1, 1]], [1, 1, 2, 2, 3, 3]),
    (2, 3): (
        [[0, 0], [1, 0], [1, 1], [0, 0], [1, 0], [1, 1]],
        [1, 2, 2, 3, 4, 4],
    ),  # the third waits
}


@pytest.mark.parametrize("sizes", BY_HAND)
def test_ages_by_hand(sizes):
    seen = rounds(buffered_cohort(N, constant_times(N, np.ones(N), 1.0, 0.0, 0.0), *sizes), 6)
    assert ([ages.tolist() for _, _, ages, _ in seen], [end for *_, end in seen]) == BY_HAND[sizes]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 3), st.sampled_from([0.0, 0.3]), st.integers(0, 5))
def test_every_arrival_could_have_been(size, concurrency, max_age, dropout, seed):
    """A client is under way once at a time, from a round that its age says, for as long as its trip takes."""
    clock = lognormal_times(N, ACTIVITY)
    seen = rounds(buffered_cohort(N, clock, size, concurrency, max_age, dropout), 30, seed)
    ends, last = [0.0, *(end for *_, end in seen)], np.full(N, -1)  # ends[v]: when version v became the server's
    for t, (ids, present, ages, end) in enumerate(seen):
        assert len(set(ids.tolist())) == len(ids)
        assert present.sum() == size
        assert ((ages >= 0) & (ages <= max_age)).all()
        for client, age in zip(ids[present], ages[present], strict=True):
            sent = t - age  # the version it was sent, while that was the server's
            trip = clock.trip(seed, np.array([client]), np.array([sent]))[0]
            assert ends[t] - ends[sent + 1] - 1e-9 <= trip <= end - ends[sent] + 1e-9
            assert sent > last[client]
        last[ids] = t
    assert (np.diff(ends) >= 0).all()


def test_as_many_as_asked_for_are_under_way():
    """Little's law: arrivals a second x seconds of a trip = clients under way; slow ones come rarely and take long."""
    clock = lognormal_times(N, ACTIVITY)
    seen = rounds(buffered_cohort(N, clock, 2, 20, max_age=1000), 2000)
    trips = [clock.trip(0, ids, np.full(len(ids), t) - ages).sum() for t, (ids, _, ages, _) in enumerate(seen)]
    assert sum(trips) / seen[-1][3] == pytest.approx(20, rel=0.02)  # 2 %: those still under way at the end


def test_the_lost_are_counted_and_do_not_report():
    clock = lognormal_times(N, ACTIVITY)
    seen = rounds(buffered_cohort(N, clock, 4, 16, dropout=0.3), 300)
    lost = sum((~present).sum() for _, present, _, _ in seen)
    assert abs(lost / (lost + 1200) - 0.3) < 5 * np.sqrt(0.21 / (lost + 1200)) + 0.01  # a few beyond the slots
    fresh = rounds(buffered_cohort(N, clock, 4, 16, max_age=1), 50)
    assert sum((~present).sum() for _, present, _, _ in fresh) > 0


def test_a_play_is_a_function_of_seed_and_round():
    make = lambda: buffered_cohort(N, lognormal_times(N, ACTIVITY), 4, 16, dropout=0.1)
    forward, back = make(), make()
    late = back.draw(3, 9)
    assert all((a == b).all() for a, b in zip([forward.draw(3, t) for t in range(10)][9], late, strict=True))
    assert (forward.draw(3, 9)[0] != forward.draw(4, 9)[0]).any()


BAD = {
    "2 size \\+ concurrency is 80": lambda: buffered_cohort(N, constant_times(N, ACTIVITY), 20, 40),
    "must not be negative": lambda: buffered_cohort(N, constant_times(N, ACTIVITY), 20, -1),
    "over must be at least 1": lambda: deadline_cohort(N, constant_times(N, ACTIVITY), 20, over=0.5),
    "clock.name": lambda: deadline_cohort(N, None, 20),
    "a probability": lambda: buffered_cohort(N, constant_times(N, ACTIVITY), 2, 4, dropout=1.0),
    "larger than the population": lambda: deadline_cohort(N, constant_times(N, ACTIVITY), N + 1),
}


@pytest.mark.parametrize("message", BAD)
def test_cohorts_that_cannot_be(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
