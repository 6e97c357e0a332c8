"""Figures that were kept: what is read, what is refused, and which way a ratio goes."""

import json

import pytest

from jaxfed.bench import workloads
from jaxfed.bench.comparison import COMPARED, check_common, compare_figures, read_figures
from jaxfed.cli import main

ROW = dict.fromkeys(COMPARED, 10.0)


def write(path, figures):
    path.write_text(figures if isinstance(figures, str) else json.dumps(figures))
    return str(path)


def run_bench(monkeypatch, *words):
    monkeypatch.setattr(main, "set_up_process", lambda: None)
    monkeypatch.setattr("sys.argv", ["jaxfed", "bench", *words])
    main.main()


@pytest.fixture
def nothing_is_measured(monkeypatch):
    def measure(*args):
        raise AssertionError("it was measured")

    monkeypatch.setattr(workloads, "bench_workload", measure)


def test_above_one_is_better_whatever_the_figure():
    """Less time and memory, or more clients a second."""
    better = ROW | {"ours_ms": 5.0, "peak_memory_mb": 4.0, "clients_per_second": 30.0, "sequential_ms": None}
    ratios = dict(zip(COMPARED, compare_figures(better, ROW), strict=True))
    assert (ratios["ours_ms"], ratios["peak_memory_mb"], ratios["clients_per_second"]) == (2.0, 2.5, 3.0)
    assert ratios["sequential_ms"] is None
    assert ratios["compile_seconds"] == 1.0


@pytest.mark.usefixtures("nothing_is_measured")
def test_kept_figures_are_compared_without_a_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    this = write(tmp_path / "a.json", {"W1": ROW | {"ours_ms": 4.0}, "W2": ROW})
    other = write(tmp_path / "b.json", {"W3": ROW, "W1": ROW})
    run_bench(monkeypatch, "--from", this, "--compare", other)
    report, _, table = capsys.readouterr().out.partition(str(other))
    assert "W2" in report
    assert "above 1: this run is better" in table
    assert "2.50" in next(line for line in table.splitlines() if "W1" in line)
    assert not [line for line in table.splitlines() if "W2" in line or "W3" in line]


def test_what_is_measured_is_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(workloads, "bench_workload", lambda *args: ROW | {"ours_ms": 40.0})
    run_bench(monkeypatch, "W1", "--compare", write(tmp_path / "b.json", {"W1": ROW}))
    assert "0.25" in capsys.readouterr().out.rpartition("above 1")[2]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "no such file"),
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[1, 2]", "no figures of a benchmark"),
        ("{}", "no figures of a benchmark"),
        ('{"W1": {"rounds": 3}}', "no figures of a benchmark"),
        ('{"W1": {"ours_ms": 1}, "[/W]": {"ours_ms": 1}}', "there is no workload '[/W]'"),
        ('{"W1": {"ours_ms": null}}', "ours_ms of W1 is None"),
        ('{"W1": {"ours_ms": -3}}', "ours_ms of W1 is -3: it must be a finite number above 0"),
        ('{"W1": {"ours_ms": NaN}}', "ours_ms of W1 is nan"),
        ('{"W1": {"ours_ms": 1, "limit_ms": 0}}', "limit_ms of W1 is 0"),
        ('{"W1": {"ours_ms": 1, "compile_seconds": 1e999}}', "compile_seconds of W1 is inf"),
        ('{"W1": {"ours_ms": 1, "host_ms": -1}}', "host_ms of W1 is -1: it must be a finite number of at least 0"),
        ('{"W1": {"ours_ms": 1, "limit_ms": "fast"}}', "limit_ms of W1 is 'fast'"),
        ('{"W5": {"ours_ms": 1}}', "has W5, and none of W1"),
    ],
)
@pytest.mark.usefixtures("nothing_is_measured")
def test_a_file_that_is_not_fit_is_one_line_before_anything_is_measured(content, wrong, tmp_path, monkeypatch, capsys):
    path = tmp_path / "b.json"
    if content is not None:
        write(path, content)
    with pytest.raises(SystemExit) as error:
        run_bench(monkeypatch, "W1", "--compare", str(path))
    assert error.value.code == 2
    told = capsys.readouterr()
    assert wrong in told.err
    assert len(told.err.splitlines()) == 1
    assert not told.out


@pytest.mark.usefixtures("nothing_is_measured")
def test_options_that_do_not_go_together(tmp_path, monkeypatch, capsys):
    kept = write(tmp_path / "a.json", {"W1": ROW})
    for words, wrong in (
        (("--from", kept, "--json", kept), "leave one of them out"),
        (("W2", "--from", kept), "has no W2, but W1"),
    ):
        with pytest.raises(SystemExit) as error:
            run_bench(monkeypatch, *words)
        assert error.value.code == 2
        assert wrong in capsys.readouterr().err


def test_workloads_that_are_asked_for_are_read(tmp_path):
    path = write(tmp_path / "a.json", {"W1": ROW, "W2": ROW})
    assert [*read_figures(path, ["W2"])] == ["W2"]
    assert [*read_figures(path)] == ["W1", "W2"]
    check_common(path, {"W1": ROW, "W2": ROW}, ["W2", "W3"])
