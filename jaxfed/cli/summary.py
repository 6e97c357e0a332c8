"""The summary of a run or of an evaluation, in the terminal."""

from typing import Any


def describe_best(summary: dict[str, Any], every: int) -> str:
    """Which round was chosen, of how many that were evaluated: each of `every`, and the last."""
    rounds = summary["rounds"]
    looks = -(-rounds // every)
    many = f"{looks:,} evaluation{'s' * (looks > 1)} in {rounds:,} round{'s' * (rounds > 1)}"
    return f"best of {many}, by validation: round {summary['best_round']}"


def print_summary(values: dict[str, Any], title: str) -> None:
    """A table of the headline metrics, then the other facts of a summary."""
    from rich.console import Console

    from jaxfed.core.excerpt import printable
    from jaxfed.training.records import ERROR_COLUMNS, LEAKY_NOTE, TERMINAL_FACTS, format_fact, ranking_columns
    from jaxfed.training.terminal_table import print_table

    leaky = f" ({LEAKY_NOTE})" if values.get("leaky") else ""
    out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    exposed = ("er@10",) if any(name.endswith("/er@10") for name in values) else ()
    ranked = ranking_columns(values)
    usual = ranked or ERROR_COLUMNS
    columns = [each for each in (*usual, *exposed) if any(name.endswith(f"/{each}") for name in values)]
    first, lines = f"/{columns[0]}" if columns else "", []
    for part in [name.removesuffix(first) for name in values if first and name.endswith(first)]:
        found = (values.get(f"{part}/{column}") for column in columns)
        few = f" (≤ {values['sampled_negatives']} negatives)" if "sampled_negatives" in values else ""
        label = printable(part) + few * part.endswith("sampled")
        lines.append([label, *("" if value is None else f"{value:.4f}" for value in found)])
    print_table(out, printable(title + leaky), ["", *columns], lines)
    spent = {name.removeprefix("seconds/"): value for name, value in values.items() if name.startswith("seconds/")}
    stages = [f"{name} {value:,.1f}" for name, value in spent.items() if value is not None]
    if stages:  # of a run; the first three pass while devices compute
        out.print(printable(f"{'seconds by stage':>26}  {', '.join(stages)}"))
    for fact in TERMINAL_FACTS:
        if value := values.get(fact):
            text = format_fact(fact, value)
            out.print(printable(f"{fact:>26}  {text}"))
