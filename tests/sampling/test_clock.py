"""Simulated time: what a trip takes, who is awake, and times that cannot be."""

import gzip

import numpy as np
import pytest

from jaxfed.sampling.clock import HOUR, constant_times, lognormal_times, trace_times

N = 400
ACTIVITY = np.arange(1, N + 1)
EVERYONE = np.arange(N)


def test_constant_times_are_sums():
    clock = constant_times(N, ACTIVITY, download=1.0, compute=0.5, upload=3.0)
    assert clock.trip(7, np.array([0, 9]), np.array([0, 4])).tolist() == [4.5, 9.0]
    assert clock.awake is None


def test_lognormal_times_have_the_medians_of_their_class_and_the_spread_asked_for():
    clock = lognormal_times(N, np.ones(N), 2.0, 0.0, 0.0, spread=0.5, shares=(0.75, 0.25), slowness=(1.0, 8.0))
    logs = np.log([clock.trip(0, EVERYONE, np.full(N, visit)) for visit in range(300)])
    medians, off = np.sort(np.median(logs, 0)), 5 * 1.25 * 0.5 / np.sqrt(300)  # five deviations of a median
    assert abs(medians[:300] - np.log(2)).max() < off
    assert abs(medians[300:] - np.log(16)).max() < off
    alone = lognormal_times(N, np.ones(N), 1.0, 0.0, 0.0, spread=0.5, shares=(1.0,), slowness=(1.0,))
    logs = np.log([alone.trip(0, EVERYONE, np.full(N, visit)) for visit in range(50)])
    assert abs(logs.mean()) < 5 * 0.5 / np.sqrt(logs.size)
    assert abs(logs.std() - 0.5) < 5 * 0.5 / np.sqrt(2 * logs.size)
    both = lognormal_times(N, ACTIVITY, 2.0, 0.5, 3.0, spread=0.0, shares=(1.0,), slowness=(1.0,))
    assert both.trip(0, EVERYONE, EVERYONE) == pytest.approx(5 + 0.5 * ACTIVITY)


def test_a_trip_is_the_clients_and_the_visits_not_the_cohorts():
    clock = lognormal_times(N, ACTIVITY)
    some = np.array([5, 3, 77])
    assert (clock.trip(1, some, np.full(3, 4)) == clock.trip(1, EVERYONE, np.full(N, 4))[some]).all()
    assert (clock.trip(1, some, np.full(3, 4)) != clock.trip(2, some, np.full(3, 4))).all()
    assert (clock.trip(1, some, np.full(3, 4)) != clock.trip(1, some, np.full(3, 5))).all()


def test_who_is_awake_follows_the_hour_of_the_clients_day():
    day = tuple(0.9 if 0 <= hour < 8 else 0.1 for hour in range(24))
    clock = constant_times(N, ACTIVITY, awake=day, zones=2)
    first, second = EVERYONE % 2 == 0, EVERYONE % 2 == 1  # twelve hours apart
    for hour, nights in ((3, first), (15, second), (27, first)):
        there = clock.awake(0, hour * HOUR + 100)
        assert abs(there[nights].mean() - 0.9) < 5 * np.sqrt(0.09 / 200)
        assert abs(there[~nights].mean() - 0.1) < 5 * np.sqrt(0.09 / 200)
        assert (there == clock.awake(0, hour * HOUR + 3000)).all()  # for the hour
    assert (clock.awake(0, 0) != clock.awake(0, 24 * HOUR)).any()


def test_zones_are_ahead_of_one_another():
    """Of three zones the second lives eight hours after the first, the third sixteen: its midnight is at eight."""
    clock = constant_times(N, ACTIVITY, awake=(1.0,) + (0.0,) * 23, zones=3)
    for hour, zone in ((0, 0), (16, 1), (8, 2)):
        assert (clock.awake(0, hour * HOUR) == (zone == EVERYONE % 3)).all()


def write(tmp_path, text):
    (tmp_path / "t.csv").write_text("client,download,compute,upload\n" + text)
    return str(tmp_path / "t.csv")


NAMES = np.array(["a", "b"])


def test_a_trace_is_replayed_visit_by_visit(tmp_path):
    clock = trace_times(2, NAMES, write(tmp_path, "b,1,2,3\na,1,1,1\nb,10,20,30\nelsewhere,9,9,9\n"))
    assert clock.trip(0, np.array([0, 1, 1, 1]), np.array([5, 0, 1, 2])).tolist() == [3.0, 6.0, 60.0, 6.0]


def test_a_trace_of_any_ending_knows_clients_by_the_words_they_are(tmp_path):
    """Beyond 63 bits two numbers are one float."""
    names, rows = np.array([str((1 << 63) + i) for i in range(2)]), "client\tdownload\tcompute\tupload\n"
    rows += f" {names[1]}\t1\t2\t 3\n{names[0]} \t1\t1\t1\n"
    path = tmp_path / "T.TSV.gz"
    path.write_bytes(gzip.compress(rows.encode()))
    clock = trace_times(2, names, str(path))
    assert clock.trip(0, np.array([0, 1]), np.array([0, 0])).tolist() == [3.0, 6.0]


BAD_TRACES = {
    "a,1,1,1\nb,-1,0,0\n": "row 2 has a negative time",
    "a,1,1,1\nb,inf,0,0\n": "infinity",
    "a,1,1,1\nb,,0,0\n": "no value",
    "a,1,1,1\n": "no row for client b",
    "a,1,1,1\nb,0,0,0\n": "no time at all",
    "a,1,1,1\nb,soon,0,0\n": "has 'soon', which is no number, in row 2",
}


@pytest.mark.parametrize("text", BAD_TRACES, ids=list(BAD_TRACES.values()))
def test_impossible_traces(tmp_path, text):
    with pytest.raises(ValueError, match=BAD_TRACES[text]):
        trace_times(2, NAMES, write(tmp_path, text))


def test_a_trace_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="path is empty"):
        trace_times(2, NAMES)
    with pytest.raises(ValueError, match="no such file"):
        trace_times(2, NAMES, str(tmp_path / "none.csv"))
    (tmp_path / "u.csv").write_text("client,download\na,1\n")
    with pytest.raises(ValueError, match="no column 'compute'"):
        trace_times(2, NAMES, str(tmp_path / "u.csv"))


BAD = {
    "nobody is in class 1": lambda: lognormal_times(10, np.ones(10), shares=(0.99, 0.01), slowness=(1.0, 2.0)),
    "must be 1 together": lambda: lognormal_times(N, ACTIVITY, shares=(0.5, 0.2), slowness=(1.0, 2.0)),
    "a share and a slowness": lambda: lognormal_times(N, ACTIVITY, shares=(1.0,), slowness=(1.0, 2.0)),
    "clock.upload is -1": lambda: constant_times(N, ACTIVITY, upload=-1.0),
    "all times are 0": lambda: constant_times(N, ACTIVITY, 0.0, 0.0, 0.0),
    "one probability, or 24": lambda: constant_times(N, ACTIVITY, awake=(0.5, 0.5)),
    "not all 0": lambda: constant_times(N, ACTIVITY, awake=(0.0,)),
    "clock.zones is 25": lambda: constant_times(N, ACTIVITY, awake=(0.5,), zones=25),
}


@pytest.mark.parametrize("message", BAD)
def test_clocks_that_cannot_be(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
