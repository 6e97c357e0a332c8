"""A run: rounds, evaluations, checkpoints, and the files that scripts rely on. The only stateful place."""

import dataclasses
import json
import math
import secrets
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from jaxfed.config.build import RunParts, build_experiment, load_data
from jaxfed.config.schema import config_to_toml, suggest, with_absolute_paths
from jaxfed.core.processes import Processes, agree_on, run_on_first, this_process
from jaxfed.core.state import State
from jaxfed.core.tree import all_finite, tree_digest, zeros_like
from jaxfed.core.types import Tree
from jaxfed.data.clients import Clients
from jaxfed.data.population import Labels
from jaxfed.evaluation.evaluator import flatten_metrics
from jaxfed.privacy import accountant
from jaxfed.training import checkpoint
from jaxfed.training.log import Logger, MetricsWriter, NullWriter, RunLoggers, log, mute, progress_bar, to_json
from jaxfed.training.resume import describe_run, finished_summary, keep_rounds, restore_run
from jaxfed.training.rounds import (
    Progress,
    RoundResult,
    compile_programs,
    count_negatives,
    evaluate_model,
    initial_arrays,
    make_run_keys,
    mark_leaky,
    run_rounds,
    scored_model,
)
from jaxfed.training.run_dir import PRIVATE, check_folder, disk_full_errors, lock_folder, write_file
from jaxfed.training.timing import peak_megabytes, profile_rounds, time_stage

LOWER_RATES = "lower the learning rates (work.optimizer.learning_rate, server.learning_rate)"


def check_select(experiment: RunParts, model: Tree, select: str) -> None:
    """Raises ValueError when validation has no such metric."""
    exam = experiment.eval_splits["val"]
    one = exam._replace(who=exam.who[:1], chunks=1)
    sums = jax.eval_shape(
        lambda *args: experiment.evaluator(*args[:2], one, args[2]), *model, make_run_keys(0).evaluation
    )
    values = flatten_metrics("val", jax.tree.map(lambda x: np.zeros(x.shape), sums))
    names = [name for name in values if "decile" not in name and not name.endswith("_sd")]
    if select not in names:
        raise ValueError(f'evaluation.select: no metric "{select}"{suggest(select, names)}')


@contextmanager
def catch_signals(say: Callable[[str], None], got: list[int]):
    """Adds the signal to `got` once Ctrl-C, SIGTERM or SIGHUP came; a second one but SIGHUP ends the program at once.

    Only the main thread may say what signals do: a run in another thread leaves them as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    hangup = getattr(signal, "SIGHUP", None)  # not on Windows

    def note(number, frame):
        got.append(number)
        if number == hangup:
            mute()  # the terminal is gone
        say(f"{signal.Signals(number).name}: finishing this round, then a checkpoint")
        for each in old:  # shells send SIGHUP twice
            signal.signal(each, signal.SIG_IGN if each == hangup else signal.SIG_DFL)

    kinds = [signal.SIGINT, signal.SIGTERM]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup has it
        kinds.append(hangup)
    old = {each: signal.signal(each, note) for each in kinds}
    try:
        yield
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


def round_seed(config: Any, every: Processes) -> int:
    """What cohorts, batches and noise are drawn from: `seed`, or a number of the system's that no file holds."""
    if config.privacy.seed == "run":
        return config.seed
    return int(run_on_first(every, "seed", lambda: str(secrets.randbits(63))))


def stored_state(config: Any, state: Any) -> Any:
    """What a checkpoint holds of a state. Links with correlated noise keep their noise in theirs: where the seed is
    secret zeros are stored, as such a run does not go on from there."""
    return state._replace(channel=zeros_like(state.channel)) if config.privacy.seed == "secret" else state


def train_run(
    config: Any,
    resume: bool = False,
    load: Callable[[Any], Clients] = load_data,
    assemble: Callable[[Any, Clients], RunParts] = build_experiment,
    loggers: Sequence[Logger] = (),
    extend: bool = True,
) -> dict[str, Any]:
    """Runs a configuration to its end and returns the summary.

    Args:
        config: what to run, and where (`run.out`).
        resume: go on with the run that is there. Its configuration must be the same, but for [run], and for the number
            of rounds where nothing was made for it (see `resume.check_config`).
        load, assemble: where the data and the pieces come from, for many runs that share them (`runs.shared_runner`).
        loggers: told every row of metrics.jsonl. A run that is resumed tells rows since the checkpoint once more.
        extend: whether a run that is resumed goes on to the number of rounds of `config`. False: it ends where it was
            to end when it began, whatever `config` says.

    Raises:
        ValueError: what a user can mend.
        SystemExit: with 128 + signal, when stopped; resume then goes on.
    """
    folder, every = Path(config.run.out), this_process()
    if every.rank:
        mute()
    agree_on(every, "configuration", lambda: None, lambda _: config_to_toml(config))
    if resume and not extend:
        rounds = run_on_first(every, "rounds", lambda: str(keep_rounds(folder, config).rounds))
        config = dataclasses.replace(config, rounds=int(rounds))
    if done := run_on_first(every, "folder", lambda: finished_summary(folder, config, resume)):
        log(f"{folder} is finished ({json.loads(done)['rounds']} rounds){'' if extend else '; --rounds N adds more'}")
        return json.loads(done)
    data = agree_on(every, "data set", lambda: load_first_alone(every, config.data, load), lambda data: data.digest)
    for note in data.source.notes:
        log(f"data: {note}")
    experiment, arrays = agree_on(every, "experiment", lambda: prepare_run(config, data, assemble), lambda _: "")
    with disk_full_errors(folder), ExitStack() as held:
        run_on_first(every, "folder", lambda: enter_folder(folder, config, resume, held))
        checkpoints = held.enter_context(checkpoint.open_checkpoints(folder / "checkpoints", config.run.keep))
        arrays, standing, before = agree_on(
            every,
            "checkpoint",
            lambda: restore_run(folder, config, checkpoints, arrays, data.digest),
            lambda found: f"round {found[1].round}",
        )
        # only now is anything changed: a run that is refused leaves all as it was
        run_on_first(every, "folder", lambda: write_config(folder, config, before))
        files = NullWriter() if every.rank else MetricsWriter(folder, standing.position, standing.round)
        told = RunLoggers(files, () if every.rank else tuple(loggers))
        try:
            arrays, standing = training_loop(config, experiment, arrays, standing, checkpoints, told)
            check_outcome(folder, standing)
            summary = summarize(config, experiment, arrays, standing, told)
        finally:
            told.close()
        if not every.rank:
            write_file(folder / "summary.json", to_json(summary, 1) + "\n")
    return summary


def prepare_run(
    config: Any, data: Clients, assemble: Callable[[Any, Clients], RunParts]
) -> tuple[RunParts, dict[str, Tree]]:
    """(the pieces of a run, its arrays before the first round). Raises ValueError where they do not fit."""
    experiment = assemble(config, data)
    for caution in privacy_cautions(config, experiment.account):
        log(f"privacy: {caution}")
    arrays = initial_arrays(experiment, config.seed)
    check_select(experiment, arrays["best"], config.evaluation.select)
    return experiment, arrays


def enter_folder(folder: Path, config: Any, resume: bool, held: ExitStack) -> str:
    """Makes a run's folder and locks it until `held` is closed; "". Raises ValueError where it is not to be used."""
    folder.mkdir(PRIVATE, parents=True, exist_ok=True)
    held.enter_context(lock_folder(folder))
    check_folder(folder, config, resume)  # once more: another process may have run since
    return ""


def write_config(folder: Path, config: Any, before: int) -> str:
    """Writes config.toml, and sets the summary of a run that is extended after `before` rounds aside; ""."""
    if before and (folder / "summary.json").exists():
        (folder / "summary.json").replace(folder / f"summary_{before}.json")
    write_file(folder / "config.toml", config_to_toml(with_absolute_paths(config)))
    return ""


def check_outcome(folder: Path, standing: Progress) -> None:
    """Raises ValueError where a run has come to its end and to nothing."""
    if not standing.updates:
        raise ValueError(
            f"{folder}: no client ever reported an update: of {standing.asked:,} clients asked, {standing.dropped:,} "
            f"dropped out (cohort.dropout) or came too late, and the updates of {standing.refused:,} were discarded "
            f"because they held NaN or infinity: lower cohort.dropout, or {LOWER_RATES}"
        )
    if not standing.best_round:
        raise ValueError(f"{folder}: the run diverged, no evaluation found numbers: {LOWER_RATES}")


def load_first_alone(every: Processes, section: Any, load: Callable[[Any], Clients]) -> Clients:
    """The data, which process 0 reads first: what it has to fetch, the others find."""
    if every.rank:
        every.meet("fetched", b"", lambda _: b"")
    try:
        return load(section)
    finally:
        if not every.rank:
            every.meet("fetched", b"", lambda _: b"")


def training_loop(config, experiment, arrays, standing, checkpoints, loggers) -> tuple[dict[str, Tree], Progress]:
    """The rounds that are left, with their evaluations and checkpoints."""
    keys, state, best = make_run_keys(config.seed), arrays["state"], arrays["best"]
    described_run = describe_run(config, experiment.data.digest)
    log("compiling, which takes longest the first time: programs are kept for the next run")
    standing.compile_seconds += compile_programs(experiment, state, keys.rounds)

    def save():
        with time_stage(standing.stages, "checkpoint"):
            standing.position = loggers.files.position()
            record = {"standing": dataclasses.asdict(standing), "privacy": epsilon_so_far(experiment, standing.round)}
            write(standing.round, {"state": stored_state(config, state), "best": best}, described_run | record)

    last, text, begin = None, "", time.perf_counter()
    halt, several = 0, experiment.processes.size > 1  # who all stop after the same round
    stopped: list[int] = []
    each = start_rounds(config, experiment, state, standing, stopped)
    background, bar = checkpoint.background_saver(checkpoints, several), progress_bar(config.rounds, standing.round)
    with catch_signals(log, stopped), background as write, bar as tick, closing(each):
        for now in each:
            state, info, ready = now
            settle_round(experiment, standing, last)  # the one before: one round ahead of the devices, no more
            last = info
            standing.count_request(ready)
            tick(standing.round, standing.updates / (standing.seconds + time.perf_counter() - begin), text)
            halt, final = ready.halt if several else sum(stopped[:1]), standing.round == config.rounds
            due = final or standing.round % config.evaluation.every == 0
            keep = halt or final or standing.round % config.run.checkpoint_every == 0
            if due or keep:
                settle_round(experiment, standing, last)
                last = None
                with time_stage(standing.stages, "compute"):
                    jax.block_until_ready(state)
                standing.seconds += time.perf_counter() - begin
            if due:
                better, text = evaluate_and_log(config, experiment, state, info, standing, loggers, keys.evaluation)
                best = jax.tree.map(lambda x: x.copy(), scored_model(experiment, state)) if better else best
                standing.finished = final or 0 < config.evaluation.patience <= standing.stale
            if keep or standing.finished:
                save()
            if due or keep:
                begin = time.perf_counter()
            if standing.finished or halt:
                break
    if not standing.finished:
        leave_run(config, standing, halt)
    return {"state": state, "best": best}, standing


def start_rounds(
    config: Any, experiment: RunParts, state: State, standing: Progress, stopped: list[int]
) -> Generator[RoundResult, None, None]:
    """The rounds that are left, some of them traced where the configuration asks for a profile."""
    todo = range(0) if standing.finished else range(standing.round, config.rounds)
    seed = round_seed(config, experiment.processes)
    each = run_rounds(experiment, state, seed, todo.start, todo.stop, stopped)
    if config.run.profile and todo:
        return profile_rounds(each, Path(config.run.out) / "profile", config.run.profile, min(2, len(todo) - 1))
    return each


def settle_round(experiment: RunParts, standing: Progress, info: dict[str, Any] | None) -> None:
    """Waits for a round and books what was sent in it; the first time that updates are discarded it says so."""
    with time_stage(standing.stages, "compute"):
        gone = standing.record_round(experiment.wire, info) if info else 0
    if gone and gone == standing.refused:
        log(
            f"round {standing.round}: the updates of {gone} clients were discarded because they held NaN or "
            "infinity; from here on they are only counted"
        )


def leave_run(config: Any, standing: Progress, halt: int) -> NoReturn:
    """Says how a run that was stopped goes on. Raises SystemExit."""
    again = f"go on with: jaxfed train {config.run.out}/config.toml --resume"
    again = again if config.privacy.seed == "run" else "its secret seed is not stored, so it cannot be resumed"
    log(f"stopped after round {standing.round}; {again}")
    raise SystemExit(128 + halt)


def evaluate_and_log(config, experiment, state, info, standing, loggers, key) -> tuple[bool, str]:
    """Evaluates on validation, writes the row; returns (is it the best so far, a word for the progress bar)."""
    with time_stage(standing.stages, "evaluate"):
        values = evaluate_model(experiment, scored_model(experiment, state), "val", key)
    train = {name: float(np.sum(value)) for name, value in info.items() if name != "clients/present"}
    if not train["clients/reported"]:  # all but counts are means over those who reported: of nobody there is none
        train |= {name: math.nan for name in train if not name.startswith(("clients/", "rows/"))}
    totals = standing.totals() | epsilon_so_far(experiment, standing.round) | {"server_sees": experiment.wire.sees}
    totals |= {"seconds": round(standing.seconds, 3), **standing.spent()}
    loggers.log_row(mark_leaky(experiment, {"round": standing.round, **train, **values, **totals}))
    # ranks of what is not a number are ranks: no model that holds one is the best
    value = values[config.evaluation.select]
    value = value if math.isfinite(value) and all_finite(scored_model(experiment, state)[0]) else math.nan
    better = standing.judge(config.evaluation.select, value)
    speed = standing.updates / max(standing.seconds, 1e-9)
    text = f"{'LEAKY ' if experiment.data.leaky else ''}{config.evaluation.select} {value:.4f}"
    loss = f"train/loss {train['train/loss']:.4f}  "
    if train.get("ring/cut"):
        log(
            f"round {standing.round}: the link ring clipped values of {train['ring/cut']:.0%} of the clients to its "
            'bound: raise its `bound`, or set `by` of the mean to "uniform" if its weights are too large'
        )
    first = standing.best_round == standing.round <= config.evaluation.every
    star = (" * best so far" if first else " *") if better else ""
    hit = f"val/sampled/hr@10 {values['val/sampled/hr@10']:.4f}  " if "val/sampled/hr@10" in values else ""
    log(f"round {standing.round:>5}  {loss}{text}  {hit}{speed:,.0f} clients/s{star}")
    return better, text


def worse_than_the_mean(labels: Labels | None, values: dict[str, float]) -> str:
    """What to say where the error on ratings of validation is larger than that of one number for all; "": nothing."""
    if labels is None or labels.kind != "rating" or "val/rating/rmse" not in values:
        return ""
    constant = float(np.sqrt(np.mean((labels.valid - labels.train.mean()) ** 2)))
    if values["val/rating/rmse"] <= constant:
        return ""
    return (
        f"val/rating/rmse {values['val/rating/rmse']:.4g} is worse than predicting the mean rating for everybody "
        f"({constant:.4g}): the model has learnt nothing, or diverged: {LOWER_RATES}, or train for more rounds"
    )


def privacy_cautions(config: Any, account: accountant.PrivacyAccount) -> list[str]:
    """What a reader of a private run's figure must know."""
    if not account.mechanisms:
        return []
    found = accountant.list_remarks(account.mechanisms, account.sampling, config.rounds, account.delta)
    if config.privacy.seed == "run":
        found.append(
            "the noise can be recomputed from the seed in config.toml, so epsilon holds only against readers who do "
            'not know that seed (privacy.seed = "secret" draws one that is not stored)'
        )
    if {each.kind for each in account.mechanisms} & {"gaussian", "correlated", "local"}:
        found.append(
            "the noise is added in floating point, whose lowest bits can reveal the sum (Mironov 2012): use "
            "discrete_gaussian or skellam to avoid this"
        )
    if config.evaluation.patience:
        select = config.evaluation.select
        found.append(f"evaluation.patience stops the run by {select}, without noise: when it stops is not covered")
    return found


def epsilon_so_far(experiment: RunParts, rounds: int) -> dict[str, float | None]:
    """epsilon and delta after so many rounds; nothing (null) where no link is private."""
    account, noised = experiment.account, bool(experiment.account.mechanisms)
    return {"epsilon": experiment.epsilon(rounds) if noised else None, "delta": account.delta if noised else None}


def privacy_record(config: Any, account: accountant.PrivacyAccount, rounds: int) -> dict[str, Any]:
    """The final figure of a run and all that it rests on; see `jaxfed privacy spent`."""
    mechanisms, sampling, delta, how, relation = account
    if not mechanisms:
        return {"epsilon": None, "delta": None, "privacy": None}
    found = accountant.compute_spent(mechanisms, sampling, rounds, delta, how, relation)
    more = [each for each in privacy_cautions(config, account) if each not in found.note]
    found = found._replace(note="; ".join([found.note, *more]))
    record = accountant.spent_to_dict(mechanisms, sampling, rounds, found)
    return {"epsilon": found.epsilon, "delta": delta, "privacy": record}


def summarize(config, experiment, arrays, standing, loggers) -> dict[str, Any]:
    """Tests the best model once and sums the run up."""
    key = make_run_keys(config.seed).evaluation
    with time_stage(standing.stages, "evaluate"):
        test = evaluate_model(experiment, arrays["best"], "test", key)
        val = evaluate_model(experiment, arrays["best"], "val", key)
    if caution := worse_than_the_mean(experiment.data.population.labels, val):
        log(caution)
    loggers.log_row(mark_leaky(experiment, {"round": standing.best_round, **test}))
    state = arrays["state"]
    summary = {
        "rounds": standing.round,
        "best_round": standing.best_round,
        "extended": standing.extended,
        "seconds": round(standing.seconds, 3),
        "compile_seconds": round(standing.compile_seconds, 3),
        **standing.spent(),
        "client_updates_per_second": round(standing.updates / max(standing.seconds, 1e-9), 1),
        "peak_memory_mb": round(peak_megabytes(), 1),
        "bytes_up_per_client": round(standing.bytes_up / max(standing.updates, 1)),
        "bytes_down_per_client": round(standing.bytes_down / max(standing.asked, 1)),
        **standing.totals(),
        "server_sees": experiment.wire.sees,
        **privacy_record(config, experiment.account, standing.round),
        "params_sha256": tree_digest(jax.tree.map(np.asarray, scored_model(experiment, state))),
        "data_sha256": experiment.data.digest,
        **count_negatives(experiment.eval_splits["test"]),
        **val,
        **test,
    }
    return mark_leaky(experiment, summary)
