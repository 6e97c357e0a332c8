"""What came of a sweep: means over seeds, its table in the terminal and as Markdown, and its figure."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxfed.core.excerpt import printable
from jaxfed.training.log import to_json
from jaxfed.training.records import HEADLINES, LEAKY_NOTE, figure_digits, lower_is_better
from jaxfed.training.run_dir import write_file
from jaxfed.training.terminal_table import print_table

WIDE = 200  # columns of a table that no terminal shows
DECADE = 10.0  # values that span one are drawn on a logarithmic axis


def test_metric(select: str) -> str:
    """The test's figure of what validation chooses by."""
    return select.replace("val/", "test/", 1)


def average_seeds(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """One flat object for each combination of the values of `keys`: `seeds`, and of every number the mean over those
    that worked and its standard deviation as NAME_sd, where there are several."""
    out = []
    for values in dict.fromkeys(tuple(each[key] for key in keys) for each in rows):
        group = [each for each in rows if tuple(each[key] for key in keys) == values]
        good = [each for each in group if not each.get("problem")]
        first: dict[str, Any] = good[0] if good else group[0]
        made = dict(zip(keys, values, strict=True)) | {"seeds": len(good)}
        made["problem"] = next((each["problem"] for each in group if each.get("problem")), "")
        for name, value in first.items():
            if name in made or name == "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                made |= {name: value}
                continue
            column = [each[name] for each in good if isinstance(each.get(name), int | float)]  # null: no number
            made[name] = statistics.mean(column)
            if len(column) > 1:
                made[f"{name}_sd"] = statistics.stdev(column)
        out.append(made)
    return out


def format_spread(each: dict[str, Any], name: str) -> str:
    """`mean`, or `mean ± sd`; nothing where there is no figure."""
    digits = figure_digits(name)
    if each.get(name) is None:
        return ""
    sd = each.get(f"{name}_sd")
    return f"{each[name]:,.{digits}f}" + ("" if sd is None else f" ± {sd:,.{digits}f}")


def best_row(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The combination with the best mean of what validation chooses by; empty if none worked."""

    def merit(each):
        return -each["selected"] if lower_is_better(each["select"]) else each["selected"]

    return max((each for each in every if each["seeds"]), key=merit, default={})


def shorten_keys(keys: Sequence[str]) -> list[str]:
    """The last words of keys, whole ones where two would be the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return [key if last.count(word) > 1 else word for key, word in zip(keys, last, strict=True)]


def table_cells(every: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[list[str]]:
    """The table: its heads, then a line for each combination, * at the best by validation."""
    select = {each["select"] for each in every if each["seeds"]}
    failed, chosen = any(each["problem"] for each in every), best_row(every)
    validation = select.pop() if len(select) == 1 else "chosen by"
    ranked = any(HEADLINES[0] in each for each in every) or validation == "chosen by"
    metrics = HEADLINES if ranked else (test_metric(validation),)  # rows with labels have no ranks
    figures = [name.replace("/", " ") for name in (validation, *metrics)]
    heads = ["", *shorten_keys(keys), *figures, "best round", "seconds", "seeds", *(["problem"] if failed else [])]
    made = [heads]
    for each in every:
        figures = [format_spread(each, name) for name in ("selected", *metrics)]
        figures += [format_spread(each, "best_round"), format_spread(each, "seconds"), str(each["seeds"])]
        mark = "*" * (each is chosen) + " LEAKY" * bool(each.get("leaky"))
        line = [mark.strip(), *(str(each[key]) for key in keys), *figures]
        made.append([printable(cell) for cell in [*line, *([each["problem"]] if failed else [])]])
    return made


def sweep_markdown(every: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """The same as Markdown."""
    heads, *lines = [[cell.replace("|", "\\|") for cell in line] for line in table_cells(every, keys)]
    rule = "|---" * (len(keys) + 1) + "|---:" * (len(heads) - len(keys) - 1) + "|"
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def write_results(folder: Path, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """results.json, a flat object a run, and results.md, a line for each combination, which are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    every = average_seeds(rows, keys)
    write_file(folder / "results.json", to_json(rows, 1) + "\n")
    write_file(folder / "results.md", sweep_markdown(every, keys))
    return every


def print_results(every: Sequence[dict[str, Any]], keys: Sequence[str], title: str) -> None:
    """The same in the terminal."""
    from rich.console import Console

    leaky = f" ({LEAKY_NOTE})" if any(each.get("leaky") for each in every) else ""
    heads, *lines = table_cells(every, keys)
    out = Console(highlight=False, markup=False, emoji=False)
    if not out.is_terminal:
        out.width = WIDE
    print_table(out, title + leaky, heads, lines, len(keys) + 1)


def figure_lines(every: Sequence[dict[str, Any]], keys: Sequence[str], metric: str) -> dict[str, list[tuple]]:
    """{the values of all keys but the first: [(value of the first, metric, sd)]} of what worked; numbers in order."""
    made: dict[str, list[tuple]] = {}
    for each in (each for each in every if each["seeds"]):
        label = ", ".join(f"{word} {each[key]}" for key, word in zip(keys[1:], shorten_keys(keys)[1:], strict=True))
        made.setdefault(label, []).append((each[keys[0]], each[metric], each.get(f"{metric}_sd", 0.0)))
    numbers = all(isinstance(each[keys[0]], int | float) for each in every)
    return {label: sorted(line) if numbers else line for label, line in made.items()}


def draw_figure(every: Sequence[dict[str, Any]], keys: Sequence[str], path: Path, say: Callable[[str], None]) -> bool:
    """A figure: what validation chooses by against the first key, a line for each value of the others, sd over seeds.

    Says so, and is False, where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        say("no figure: matplotlib is missing: pip install matplotlib")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    values = [each[keys[0]] for each in every if each["seeds"]]
    numbers = all(isinstance(value, int | float) for value in values)
    for label, line in figure_lines(every, keys, "selected").items():
        x, y, sd = zip(*line, strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "label": label or None}
        axes.errorbar(x if numbers else [*map(str, x)], y, sd if any(sd) else None, **style)
    if numbers and min(values) > 0 and max(values) / min(values) >= DECADE:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xticks(sorted({*values}), [f"{value:g}" for value in sorted({*values})])
    leaky = " (LEAKY)" if any(each.get("leaky") for each in every) else ""
    axes.set(xlabel=keys[0], ylabel=best_row(every)["select"] + leaky)
    axes.grid(True, which="both", alpha=0.2)
    if len(keys) > 1:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
