"""`jaxfed privacy calibrate | spent | probe`: the noise that a guarantee needs, the guarantee that a run has, and a
search for what breaks it."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

DRAWN = ("poisson", "uniform", "everyone", "cyclic")  # names of samplers, in a configuration, that have a bound
UNIT = "One client: all that it sends in all rounds, whatever the number of its examples and users."
RELATION = {
    "add-or-remove": "with the client against without what it sends",
    "replace-one": "any other client in its place (every sensitivity doubles)",
}
NOT_COVERED = (
    "the private part of the model, which stays on its client and is not noised: the guarantee is joint, "
    "against everybody but the client itself",
    "train/loss, clip/clients, the numbers of clients and rows, bytes: what a simulation counts, without noise",
    "validation and test metrics, and the choice of the best round by them: they are computed without noise",
    "who is asked and who reports, and the rows that a client asks for, where the server sees them (server_sees)",
    "hyper-parameters tuned on the same data: every run spends its own epsilon",
)


def add_calibrate_options(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `calibrate`; `add(name, help)` makes a parser."""
    calibrate = add("calibrate", "The least noise with which a run spends at most epsilon at delta.")
    calibrate.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.toml",
        help="where delta, population, rounds, the cohort and the accountant come from, unless they are given",
    )
    for name, kind, text in (
        ("epsilon", float, "of the whole run"),
        ("delta", float, "below 1 / population"),
        ("population", int, "clients"),
        ("rounds", int, "of the run"),
    ):
        calibrate.add_argument(f"--{name}", type=kind, help=text)
    calibrate.add_argument("--cohort", type=int, help="clients of a round; poisson: expected")
    # words are checked by the accountant, whose message is one line
    calibrate.add_argument(
        "--sampler",
        metavar="NAME",
        help=f"how a cohort is drawn: {', '.join(DRAWN)} (default: poisson). uniform: a fixed size",
    )
    calibrate.add_argument("--cap", type=int, metavar="N", help="poisson: most clients in a round")
    calibrate.add_argument("--relation", metavar="NAME", help=f"{' or '.join(RELATION)}: what is compared")
    calibrate.add_argument(
        "--accountant",
        metavar="NAME",
        help="rdp (default) or pld. pld: epsilon is lower than with rdp, by 5 to 50 per cent; slower",
    )


def add_privacy_options(command: Any) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    text = "Calibrate noise, report what a run spent, or test a guarantee empirically."
    commands = command("privacy", text).add_subparsers(dest="about", required=True)

    def add(name, text):
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    add_calibrate_options(add)
    spent = add("spent", "What a run spent, and how that figure comes about.")
    spent.add_argument("run", metavar="RUN")
    probe = add(
        "probe",
        "Replay rounds with and without single clients, and compare how much one client changes the released sums with "
        "the bound that their noise was calibrated for. Exit code 1 if a bound is exceeded.",
    )
    probe.add_argument("config", metavar="CONFIG.toml")
    probe.add_argument("--clients", type=int, default=16, help="of each round, from the least to the most active (16)")
    probe.add_argument("--rounds", type=int, default=2, help="to play (2)")


def privacy_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed privacy"""
    if args.about == "probe":
        probe_command(args, overrides)
    elif overrides and not (getattr(args, "config", "") and "." in overrides[0]):  # as keys of a configuration have
        raise ValueError(f"unknown option {overrides[0]}")
    else:
        from jaxfed.core.excerpt import printable

        if args.about == "calibrate":
            fill_options(args, overrides)
        for line in calibrate_command(args) if args.about == "calibrate" else spent_command(args.run):
            print(printable(line))


def probe_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed privacy probe"""
    from jaxfed.config.build import load_data
    from jaxfed.config.config_files import read_config
    from jaxfed.config.overrides import override_config
    from jaxfed.core.excerpt import printable
    from jaxfed.training.privacy_probe import TOLERANCE, probe_rounds

    if args.clients < 1 or args.rounds < 1:
        raise ValueError("--clients and --rounds must be at least 1")
    config = override_config(read_config(args.config), overrides)
    data = load_data(config.data)
    worst: dict[str, Any] = {}
    tried = set()
    for change in probe_rounds(config, data, args.clients, args.rounds):
        tried.add((change.round, change.client))
        if change.link not in worst or not change.ratio <= worst[change.link].ratio:  # NaN is the worst
            worst[change.link] = change if not math.isnan(change.ratio) else change._replace(ratio=math.inf)
    if not tried:
        raise ValueError(
            f"no client reported in {args.rounds} rounds, so nothing was tried: raise --rounds or cohort.size, or "
            "lower cohort.dropout or the learning rates"
        )
    for link, change in worst.items():
        name = data.population.names[change.client]
        print(
            f"{link}: the largest change over its bound is {change.ratio:.4f} (client {printable(name)}, "
            f"{change.interactions:,} interactions, {change.done}, round {change.round})"
        )
    trials = f"{len(tried)} clients of {args.rounds} rounds"
    print(f"no violation among {trials} proves nothing; one violation disproves the guarantee")
    if not max(change.ratio for change in worst.values()) <= 1 + TOLERANCE:
        print(
            "jaxfed: one client changed a sum by more than the bound that its noise was calibrated for: the stated "
            "epsilon is too small. Check the links to the left of the noise",
            file=sys.stderr,
        )
        sys.exit(1)


def fill_options(args: argparse.Namespace, overrides: list[str]) -> None:
    """Takes what `calibrate` is not told from its configuration, or the defaults. Raises ValueError with all that is
    missing."""
    values: dict[str, Any] = {"sampler": "poisson", "accountant": "rdp", "cap": 0}
    if args.config:
        from jaxfed.config.build import load_data
        from jaxfed.config.config_files import read_config
        from jaxfed.config.overrides import override_config

        config = override_config(read_config(args.config), overrides)
        population = args.population or load_data(config.data).population.num_clients
        values |= {"population": population, "delta": config.privacy.delta, "rounds": config.rounds}
        values |= {"sampler": config.cohort.name, "cohort": getattr(config.cohort, "size", 0) or min(128, population)}
        values |= {"cap": getattr(config.cohort, "cap", 0), "accountant": config.privacy.accountant}
        values |= {"relation": config.privacy.relation or None}
    for name, value in values.items():
        if not getattr(args, name) and getattr(args, name) != 0:
            setattr(args, name, value)
    needed = ["epsilon", "delta", "population", "rounds", *(["cohort"] if args.sampler != "everyone" else [])]
    if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
        more = "" if args.config else ", or a configuration that says all but --epsilon"
        raise ValueError(f"pass {', '.join(missing)}{more}")


def calibrate_command(args: argparse.Namespace) -> list[str]:
    """What `jaxfed privacy calibrate` prints. Raises ValueError for what cannot be."""
    from jaxfed.core.excerpt import shorten
    from jaxfed.privacy.accountant import Mechanism, calibrate_noise, compute_spent
    from jaxfed.privacy.releases import SAMPLERS, Sampling, check_accounting
    from jaxfed.sampling.cohort import poisson_cohort

    if args.sampler in ("deadline", "buffered"):
        raise ValueError(
            f"--sampler {args.sampler}: who reports depends on how fast clients are, so no bound is known: choose one "
            f"of {', '.join(DRAWN)}"
        )
    sampler = "fixed" if args.sampler == "uniform" else args.sampler  # as the accountant calls it
    if sampler not in SAMPLERS:
        raise ValueError(f'no sampler "{shorten(sampler)}": choose one of {", ".join(DRAWN)}')
    size = args.population if sampler == "everyone" else args.cohort
    if not size:
        raise ValueError("pass --cohort: how many clients a round has (poisson: expected)")
    sampling = Sampling(sampler, args.population, size, args.cap)
    check_accounting((), sampling, args.delta, args.relation)
    if sampler == "poisson":  # the slots of the cohort that a run with these numbers has
        sampling = sampling._replace(cap=poisson_cohort(args.population, size, args.cap).slots)
    least = calibrate_noise(
        args.epsilon, args.delta, sampling, args.rounds, accountant=args.accountant, relation=args.relation
    )
    digits = 3 - math.floor(math.log10(least))
    noise = math.ceil(least * 10**digits) / 10**digits  # rounded up: less would spend more
    found = compute_spent(
        [Mechanism("gaussian", noise)], sampling, args.rounds, args.delta, args.accountant, args.relation
    )
    return [
        f"noise multiplier {noise:.4g}: Gaussian noise on the sum, over the largest L2 norm that one client can add",
        f"epsilon {found.epsilon:.4g} at delta {found.delta:g} after {args.rounds} rounds ({found.accountant})",
        f"assumed: {UNIT} {found.relation}: {RELATION[found.relation]}.",
        f"cohorts: {describe_cohorts(sampling)}; {found.note}",
        "for the configuration, after the link that bounds the norm (clip):",
        "[[channel]]",
        'name = "gaussian"',
        f"multiplier = {noise:.4g}",
    ]


def spent_command(folder: str) -> list[str]:
    """What `jaxfed privacy spent` prints. Raises ValueError for a run without a figure."""
    from jaxfed.training.run_dir import locate_run, read_summary

    path = locate_run(folder)
    if not (path / "summary.json").is_file():
        raise ValueError(f"{folder} is not finished (no summary.json): jaxfed train {folder}/config.toml --resume")
    found = read_summary(path).get("privacy")
    if not found:
        raise ValueError(f"{folder} has no differential privacy: no link of its channel adds noise (epsilon inf)")
    if isinstance(found, dict) and found.get("epsilon", 0) is None:
        raise ValueError(f"{folder}: epsilon is infinite: the noise is too small to be counted")
    try:
        return explain_spent(found)
    except (LookupError, TypeError, AttributeError, ArithmeticError):
        raise ValueError(
            f"{folder}/summary.json is damaged: what it says of privacy cannot be read: delete it, then jaxfed train "
            f"{folder}/config.toml --resume writes it again"
        ) from None


def describe_cohorts(sampling: Any) -> str:
    """Who takes part, in words."""
    size, population = f"{sampling.size:,}", f"{sampling.population:,}"
    return {
        "poisson": f"each of {population} clients by itself with probability {sampling.size / sampling.population:.4g}"
        + (f", at most {sampling.cap:,} at a time" if sampling.cap else ""),
        "fixed": f"{size} of {population} clients, drawn without replacement",
        "everyone": f"all {population} clients",
        "cyclic": f"{size} after {size} of {population} clients, in a circle",
    }[sampling.kind]


def describe_mechanism(mechanism: Any) -> str:
    """What one mechanism releases and under which noise, in words."""
    name = f"{mechanism.name}: " if mechanism.name else ""
    factor = f"{mechanism.multiplier:.4g} times"
    return (
        name
        + {
            "gaussian": f"a sum over the cohort; Gaussian noise, {factor} the most that one client can add (L2)",
            "discrete_gaussian": f"a sum over the cohort in whole numbers; discrete Gaussian noise, {factor} the most "
            f"that one client can add (L2 {mechanism.l2:.4g} grid units)",
            "skellam": f"a sum over the cohort in whole numbers; Skellam noise, {factor} the most that one client can "
            f"add (L2 {mechanism.l2:.4g}, L1 {mechanism.l1:.4g} grid units), if no client's share of it is missing",
            "correlated": f"a sum over the cohort; noise correlated over rounds, {factor} what one client can change "
            "of the whole run (L2)",
            "local": f"each client's own message, pure epsilon {mechanism.epsilon:.4g}"
            if mechanism.epsilon
            else f"each client's own message; Gaussian noise, {factor} its largest norm (L2)",
        }[mechanism.kind]
    )


def explain_spent(privacy: dict[str, Any]) -> list[str]:
    """The story of a run's figure, from what its summary holds (privacy.as_dict). Raises ValueError if damaged."""
    from jaxfed.privacy.accountant import make_ledger, spent_from_dict

    mechanisms, sampling, rounds, found = spent_from_dict(privacy)
    by = {"rdp": "Renyi differential privacy", "pld": "privacy loss distributions"}.get(found.accountant, "")
    lines = [
        f"epsilon {found.epsilon:.4g} at delta {found.delta:g}, by {by}",
        f"private     {UNIT}",
        f"compared    {found.relation}: {RELATION[found.relation]}",
        f"cohorts     {describe_cohorts(sampling)}",
        *(f"each round  {describe_mechanism(each)}" for each in mechanisms),
        f"composed    {rounds} rounds; what one round releases beside is bounded together, as it sees one cohort",
    ]
    if found.accountant == "pld" and not (sampling.kind == "poisson" and found.relation == "replace-one"):
        figure = make_ledger(mechanisms, sampling, found.delta, found.relation)(rounds)
        lines.append(f"            by Renyi divergences alone, as the log of the run counts: {figure:.4g}")
    lines += [f"note        {each}" for each in found.note.split("; ") if each]
    return lines + [f"not covered {each}" for each in NOT_COVERED]
