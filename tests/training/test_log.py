"""What a run tells, and to whom: loggers of rows, and the standard logging."""

import json
import logging
import subprocess
import sys

import pytest

from jaxfed.config.schema import make_config
from jaxfed.data.stages import LOGGER as DATA
from jaxfed.data.stages import log_stage
from jaxfed.training.log import LOGGER, RunLoggers, StageLine, TerminalHandler, log
from jaxfed.training.loop import train_run
from tests.small import TABLE


class Rows:
    """A logger that keeps what it is told."""

    def __init__(self, fails=False):
        self.rows, self.closed, self.fails = [], 0, fails

    def log_row(self, row):
        self.rows.append(row)

    def close(self):
        self.closed += 1
        if self.fails:
            raise ValueError("closed")


def test_loggers_are_told_the_rows_of_the_file(tmp_path):
    mine = Rows()
    train_run(make_config({**TABLE, "rounds": 2, "run": {"out": str(tmp_path / "a")}}), loggers=[mine])
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert json.loads(json.dumps(mine.rows)) == rows
    assert len(rows) == 2
    assert mine.closed == 1


def test_all_loggers_are_closed_where_one_fails():
    several = Rows(), Rows(fails=True), Rows()
    with pytest.raises(ValueError, match="closed"):
        RunLoggers(several[0], several[1:]).close()
    assert [each.closed for each in several] == [1, 1, 1]


def test_lines_are_printed_as_they_are(capsys):
    log("50% of [bold]it[/bold], %s")
    assert capsys.readouterr() == ("", "50% of [bold]it[/bold], %s\n")


def test_what_is_said_of_data_stays(capsys):
    """A line between stages is shown, and ends none of them."""
    line = StageLine()
    DATA.addHandler(line)
    try:
        with log_stage("reading"):
            DATA.info("data: %s items have no title", 3)
            assert line.stages == ["reading"]
    finally:
        DATA.removeHandler(line)
    shown = [each for each in capsys.readouterr().err.splitlines() if each]
    assert set(shown) == {"data: 3 items have no title"}


@pytest.fixture
def logger():
    before = LOGGER.level, LOGGER.handlers[:], LOGGER.propagate
    yield LOGGER
    LOGGER.level, LOGGER.handlers[:], LOGGER.propagate = before
    LOGGER.setLevel(before[0])


def test_a_level_silences_it(logger, capsys):
    logger.setLevel(logging.WARNING)
    log("a line")
    assert capsys.readouterr().err == ""


def test_a_handler_redirects_it(logger, capsys, tmp_path):
    handler = logging.FileHandler(tmp_path / "log.txt")
    logger.handlers[:] = [handler]
    log("a line")
    handler.close()
    assert capsys.readouterr().err == ""
    assert (tmp_path / "log.txt").read_text() == "a line\n"


def test_a_closed_terminal_stops_the_lines_and_not_the_run(logger, monkeypatch):
    class Closed:
        quiet = False

        def print(self, *args, **kw):
            raise OSError(5, "Input/output error")

    closed = Closed()
    monkeypatch.setattr("jaxfed.training.log.terminal", lambda: closed)
    log("a line")
    assert closed.quiet


def test_handlers_that_were_there_first_stay():
    code = "import logging; a = logging.getLogger('jaxfed'); a.addHandler(logging.NullHandler()); a.setLevel(30)\n"
    code += "import jaxfed.training.log; print(len(a.handlers), a.level, a.propagate)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 30 True\n"


def test_one_handler_writes_to_the_terminal():
    assert [type(each) for each in LOGGER.handlers].count(TerminalHandler) == 1
