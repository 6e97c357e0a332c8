"""`jaxfed report`: a page that stands alone, of runs as they are, whatever their files say."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from jaxfed.config.schema import make_config
from jaxfed.training.runs import shared_runner
from tests.cli.test_compare import RUNS, SMALL
from tests.programs import run_program
from tests.small import child_environment

HOSTILE = "a<script>alert(1)</script>&\"'><img src=x onerror=alert(2)>"
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """What is on a page: its elements with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, "elements are closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((data, self.open[-1] if self.open else ""))

    def every(self, tag):
        return [attrs for name, attrs, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of some runs."""
    out, run = tmp_path_factory.mktemp("runs"), shared_runner()
    private = {
        "channel": [
            {"name": "mean", "count": 12},
            {"name": "clip", "bound": 1.0},
            {"name": "gaussian", "multiplier": 1.0},
        ],
        "cohort": {"name": "poisson", "size": 12},
    }
    more = {"private": private}
    for name, table in ({key: RUNS[key] for key in ("base", "wide", "leaky")} | more).items():
        summary, problem = run(make_config({**SMALL, **table, "run": {"out": str(out / name)}}))
        assert summary, problem
    return out


def reported(monkeypatch, capsys, path, *words):
    """The page that `jaxfed report` writes."""
    code, _, said = run_program(monkeypatch, capsys, "report", *words, "-o", path)
    assert code == 0, said
    return Page(path.read_text())


def test_a_page_stands_alone_and_is_readable(folder, tmp_path, monkeypatch, capsys):
    """No script, nothing from elsewhere; tables with captions and heads; drawings with a title and a description."""
    page = reported(monkeypatch, capsys, tmp_path / "r.html", folder / "base", folder / "wide", folder / "private")
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    for _, attrs, _ in page.elements:
        assert not {name for name in attrs if name.startswith("on")} | (attrs.keys() & {"src", "srcset", "xlink:href"})
        assert all(value.startswith("#") for name, value in attrs.items() if name == "href")
    text = (tmp_path / "r.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    tables, captions = page.every("table"), page.every("caption")
    assert len(tables) == len(captions) > 5
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.every("th"))
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len({*ids})
    drawings = [attrs for attrs in page.every("svg") if attrs.get("role") == "img"]
    assert len(drawings) == len(page.every("figure")) > 4
    for attrs in drawings:
        assert {*attrs["aria-labelledby"].split()} <= {*ids}
    levels = [tag for tag, _, _ in page.elements if tag in ("h1", "h2")]
    assert levels[0] == "h1"
    assert levels.count("h1") == 1
    assert page.every("html") == [{"lang": "en"}]


def test_its_figures_are_those_of_the_files(folder, tmp_path, monkeypatch, capsys):
    page = reported(monkeypatch, capsys, tmp_path / "r.html", folder / "base", folder / "private")
    said = " ".join(data for data, _ in page.text)
    for name in ("base", "private"):
        summary = json.loads((folder / name / "summary.json").read_text())
        assert f"{summary['test/full/ndcg@10']:.4f}" in said
        assert f"{summary['bytes_up_total'] / 1e6:,.3f}" in said
        assert str(folder / name) in said
    assert f"{json.loads((folder / 'private' / 'summary.json').read_text())['epsilon']:.4g}" in said
    rows = [json.loads(line) for line in (folder / "base" / "metrics.jsonl").read_text().splitlines()]
    assert f"{rows[0]['val/full/ndcg@10']:.4g}" in said
    for words in ("Learning curves", "by decile of activity", "epsilon so far", "seconds by stage", "95 % interval"):
        assert words in said


def test_lines_go_where_their_numbers_are(folder, tmp_path, monkeypatch, capsys):
    """A higher figure is drawn higher, a later round further to the right."""
    reported(monkeypatch, capsys, tmp_path / "r.html", folder / "base")
    text = (tmp_path / "r.html").read_text()
    line = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6]).find("polyline")
    drawn = [[float(number) for number in point.split(",")] for point in line.get("points").split()]
    rows = [json.loads(each) for each in (folder / "base" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "val/full/ndcg@10" in row]
    assert len(drawn) == len(rows) == 2
    assert drawn[0][0] < drawn[1][0]
    rise = rows[1]["val/full/ndcg@10"] - rows[0]["val/full/ndcg@10"]
    assert (drawn[1][1] < drawn[0][1]) == (rise > 0)


def test_hostile_names_are_text(folder, tmp_path, monkeypatch, capsys):
    """Of folders, titles and figures: nothing of them becomes an element or an attribute."""
    place = shutil.copytree(folder / "base", tmp_path / HOSTILE.replace("/", "\u2044"))
    rows = (place / "metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[0]) | {f"seconds/{HOSTILE}": 1.0}
    (place / "metrics.jsonl").write_text("\n".join([json.dumps(first), *rows[1:]]) + "\n")
    summary = json.loads((place / "summary.json").read_text())
    summary |= {"server_sees": HOSTILE, "protocol": HOSTILE, f"seconds/{HOSTILE}": 2.0}
    (place / "summary.json").write_text(json.dumps(summary))
    page = reported(monkeypatch, capsys, tmp_path / "r.html", place, folder / "wide", "--title", HOSTILE + "\x1b[31m")
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "img"}
    assert not [attrs for _, attrs, _ in page.elements if any(name.startswith("on") for name in attrs)]
    assert any(HOSTILE in data for data, _ in page.text)
    assert "\x1b" not in (tmp_path / "r.html").read_text()


def test_leaky_runs_are_marked_wherever_they_are_named(folder, tmp_path, monkeypatch, capsys):
    page = reported(monkeypatch, capsys, tmp_path / "r.html", folder / "base", folder / "leaky")
    assert ("LEAKY", "strong") in page.text
    legends = [data for data, tag in page.text if tag == "li" and data.startswith(str(folder / "leaky"))]
    assert any(each.endswith("leaky LEAKY") for each in legends)
    alone = reported(monkeypatch, capsys, tmp_path / "s.html", folder / "base")
    assert not any("LEAKY" in data for data, tag in alone.text)


def test_a_run_that_goes_on_has_a_page(folder, tmp_path, monkeypatch, capsys):
    """Without a test; a row that is being written is left out."""
    place = shutil.copytree(folder / "base", tmp_path / "run")
    (place / "summary.json").unlink()
    with open(place / "metrics.jsonl", "a") as file:
        file.write('{"round": 6, "val/full/nd')
    page = reported(monkeypatch, capsys, tmp_path / "r.html", place, folder / "wide")
    said = " ".join(data for data, _ in page.text)
    assert "Not finished, and without a test" in said
    assert "user by user" in said


def test_the_same_runs_give_the_same_page(folder, tmp_path, monkeypatch, capsys):
    words = (folder / "base", folder / "wide")
    reported(monkeypatch, capsys, tmp_path / "a.html", *words)
    reported(monkeypatch, capsys, tmp_path / "b.html", *words)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    (tmp_path / "a.html").read_bytes().decode("ascii")  # the same in whatever encoding it is written


def test_files_of_others_are_not_overwritten(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.html"
    path.write_text("mine, and it says jaxfed report\n")
    code, printed, said = run_program(monkeypatch, capsys, "report", folder / "base", "-o", path)
    assert (code, printed, said.count("\n")) == (2, "", 1)
    assert "--force" in said
    assert path.read_text() == "mine, and it says jaxfed report\n"
    for words in (["--force"], []):  # and then it is its own
        assert run_program(monkeypatch, capsys, "report", folder / "base", "-o", path, *words)[0] == 0


def test_what_has_no_page_is_one_line(folder, tmp_path, monkeypatch, capsys):
    empty = shutil.copytree(folder / "base", tmp_path / "empty")
    (empty / "summary.json").unlink()
    (empty / "metrics.jsonl").write_text("")
    damaged = {}
    for number, line in enumerate(
        ('{"round": 2', "[1]", '{"round": "2"}', '{"round": 2, "val/full/mrr": "high"}', "\x00")
    ):
        damaged[number] = shutil.copytree(folder / "base", tmp_path / f"damaged_{number}")
        (damaged[number] / "metrics.jsonl").write_text(line + "\n")
    summary = shutil.copytree(folder / "base", tmp_path / "summary")
    (summary / "summary.json").write_text("{")
    for words, text in (
        ([tmp_path], "no run here"),
        ([tmp_path / "none"], "no run here"),
        ([empty], "has no evaluation yet"),
        *(([each], "is damaged") for each in damaged.values()),
        ([summary], "is damaged"),
        ([folder / "base", "-o", tmp_path], "is a folder"),
    ):
        words = [*words, *(["-o", tmp_path / "r.html"] if "-o" not in words else [])]
        code, printed, said = run_program(monkeypatch, capsys, "report", *words)
        assert (code, printed, said.count("\n")) == (2, "", 1), said
        assert text in said
        assert not (tmp_path / "r.html").exists()


def test_figures_as_files(folder, tmp_path, monkeypatch, capsys):
    """A PNG and an SVG of each drawing, the same again; a stranger's file is not overwritten."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures"
    words = [folder / "base", folder / "private", "--figures", out]
    page = reported(monkeypatch, capsys, tmp_path / "r.html", *words)
    stems = {each.stem for each in out.iterdir()}
    assert {each.name for each in out.iterdir()} == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert len(stems) == len(page.every("figure"))
    before = {each.name: each.read_bytes() for each in out.iterdir()}
    assert all(data.startswith(b"\x89PNG") for name, data in before.items() if name.endswith("png"))
    reported(monkeypatch, capsys, tmp_path / "r.html", *words)
    assert {each.name: each.read_bytes() for each in out.iterdir()} == before
    (out / "stages.png").write_bytes(b"\x89PNG mine")
    code, _, said = run_program(monkeypatch, capsys, "report", *words, "-o", tmp_path / "r.html")
    assert code == 2
    assert "stages.png is there" in said


def test_without_matplotlib_a_line_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["report", folder / "base", "-o", tmp_path / "r.html", "--figures", tmp_path / "figures"]
    code, printed, said = run_program(monkeypatch, capsys, *words)
    assert (code, printed, said.count("\n")) == (2, "", 1)
    assert 'pip install "jaxfed[plots]"' in said
    assert not (tmp_path / "figures").exists()


def test_as_a_user_starts_it(folder, tmp_path):
    words = [sys.executable, "-m", "jaxfed", "report", str(folder / "base"), "-o", str(tmp_path / "new" / "r.html")]
    done = subprocess.run(words, capture_output=True, text=True, env=child_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/new/r.html\n"
    Page((tmp_path / "new" / "r.html").read_text())


# --- of a sweep ----------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a sweep over a number and words."""
    out, rows = tmp_path_factory.mktemp("sweep"), []
    for number, (rate, name) in enumerate([(0.01, "sgd"), (0.1, "adam"), (1.0, "sgd"), (9.0, HOSTILE)]):
        for seed in (0, 1):
            row = {"seed": seed, "run": "x", "select": "val/full/ndcg@10", "selected": 0.1 + number / 100 + seed / 1000}
            facts = {"test/full/hr@10": 0.2, "test/full/ndcg@10": 0.1, "best_round": 3, "seconds": 1.5}
            rows.append(row | facts | {"problem": "", "server.learning-rate": rate, "server.name": name})
    failed = {"seed": 0, "problem": HOSTILE, "server.learning-rate": 100, "server.name": "sgd"}
    (out / "results.json").write_text(json.dumps([*rows, failed]))
    return out


def test_a_page_of_a_sweep(sweep, tmp_path, monkeypatch, capsys):
    """Its table, its trials and each key; words of a key at the axis; what it holds is text."""
    page = reported(monkeypatch, capsys, tmp_path / "r.html", sweep)
    assert not {tag for tag, _, _ in page.elements} & {"script", "img"}
    said = " ".join(data for data, _ in page.text)
    assert HOSTILE in said
    for words in ("0.1305 ± 0.0007", "by server.learning-rate", "by server.name", "best so far"):
        assert words in said
    assert len(page.every("figure")) == 3
    assert "Median standard deviation over seeds of the figure of validation: 0.0007" in said
    text = (tmp_path / "r.html").read_text()
    drawing = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    line = [point.split(",") for point in drawing.find("polyline").get("points").split()]
    heights = [float(y) for _, y in line]
    assert heights == sorted(heights, reverse=True)  # the best so far goes up
    assert len(heights) == 4
    bests = [data for data, tag in page.text if data == "*" and tag in ("th", "td")]
    assert len(bests) == 1


def test_figures_of_a_sweep_as_files(sweep, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    reported(monkeypatch, capsys, tmp_path / "r.html", sweep, "--figures", tmp_path / "f")
    stems = {each.stem for each in (tmp_path / "f").iterdir()}
    assert stems == {"trials", "by_server_learning-rate", "by_server_name"}


def test_what_is_no_sweep_is_one_line(sweep, folder, tmp_path, monkeypatch, capsys):
    for name, text in (("a", "{}"), ("b", "[]"), ("c", '[{"seed": 0}]'), ("d", '[{"seed": 0, "problem": "no"}]')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
        code, printed, said = run_program(monkeypatch, capsys, "report", tmp_path / name, "-o", tmp_path / "r.html")
        assert (code, printed, said.count("\n")) == (2, "", 1)
        assert any(words in said for words in ("is damaged", "or damaged", "no run of this sweep worked"))
    code, _, said = run_program(monkeypatch, capsys, "report", sweep, folder / "base", "-o", tmp_path / "r.html")
    assert code == 2
    assert "has a page of its own" in said
