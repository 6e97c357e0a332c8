"""jaxfed device, jaxfed aggregate: on a device without a network, and what comes of it."""

import argparse
from collections.abc import Callable
from pathlib import Path


def add_device_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `device` and `aggregate`."""
    device = command("device", "Recommend to one user from an export, and train on a history, with no network.")
    device.add_argument("export", metavar="OUT", help="the folder that jaxfed export wrote")
    device.add_argument(
        "--history",
        required=True,
        metavar="FILE",
        help="ids of the items that the user met, one a line, earliest first",
    )
    device.add_argument("-k", type=int, default=10, help="how many items")
    device.add_argument("--save", metavar="MESSAGE", help="train, and write the message that the device would send")
    device.add_argument(
        "--client",
        type=int,
        metavar="NUMBER",
        help="the number of this device among the clients, from 0; no other device may have it (the number in --state, "
        "or a random one the first time, which another device may draw, too)",
    )
    device.add_argument(
        "--state",
        metavar="FOLDER",
        default="device",
        help="where the device keeps what is private (device)",
    )
    aggregate = command("aggregate", "Fold messages that devices wrote to files into a run.")
    aggregate.add_argument("run", metavar="RUN")
    aggregate.add_argument("messages", metavar="MESSAGE", nargs="+")
    aggregate.add_argument("--out", required=True, metavar="RUN", help="the folder of the run that comes of it")
    aggregate.add_argument("--least", type=int, default=1, help="do nothing where fewer messages are counted (1)")
    aggregate.add_argument(
        "--exponent", type=float, default=0.5, help="a message that is AGE rounds old weighs (1 + AGE)^-EXPONENT (0.5)"
    )


def device_command(args: argparse.Namespace) -> None:
    """jaxfed device"""
    from jaxfed.core.excerpt import printable
    from jaxfed.deployment.device import train_on_device
    from jaxfed.export.loader import find_item_numbers, load_export, recommend_by_history
    from jaxfed.training.log import log

    if args.k < 1:
        raise ValueError(f"-k is {args.k}: it must be at least 1")
    if args.client is not None and not args.save:
        raise ValueError("--client is the number that a message is sent by: pass --save MESSAGE, too")
    export = load_export(args.export)
    try:
        lines = Path(args.history).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{args.history} is no text: write an id of an item a line") from None
    history = [line.strip() for line in lines if line.strip()]
    if args.k > (most := export.manifest["most_items"]):
        log(f"-k is {args.k}: this export gives at most {most} items")
    numbers = find_item_numbers(export, history)
    if args.save and Path(args.save).exists():
        raise ValueError(f"{args.save} is there already: pass another --save")
    items, scores = recommend_by_history(export, [history], args.k)
    for place, (item, score) in enumerate(zip(items[0], scores[0], strict=True), 1):
        print(printable(f"{place:>3}  {score:8.3f}  {item:>8}  {export.titles[export.item_numbers[item]]}".rstrip()))
    if args.save:
        message = train_on_device(export, Path(args.state), numbers, args.client)
        Path(args.save).write_bytes(message.data)
        size, who = f"{len(message.data):,} bytes", f"client {message.client}"
        log(f"{args.save}: {size}, of {who} and the model of round {message.round}")


def aggregate_command(args: argparse.Namespace) -> None:
    """jaxfed aggregate"""
    from jaxfed.deployment.folded_run import fold_into_run
    from jaxfed.training.log import log

    files = [Path(name) for name in args.messages]
    folded = fold_into_run(args.run, files, Path(args.out), args.exponent, args.least)
    for name, why in folded.refused.items():
        log(f"{name}: {why}")
    for name, age in folded.counted.items():
        print(f"{name}: counted, {age} rounds old, weight {(1 + age) ** -args.exponent:.3f}")
    if not folded.counted:
        raise ValueError("no message was counted: nothing is written")
    if folded.epsilon is not None:
        log(f"privacy: epsilon of a client of every round, and of one of these messages: {folded.epsilon:.3g}")
