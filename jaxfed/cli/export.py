"""jaxfed export"""

import argparse
from collections.abc import Callable


def add_export_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `export`."""
    export = command("export", "Write the best model of a run as files that JAX and NumPy alone can run.")
    export.add_argument("run", metavar="RUN")
    export.add_argument("out", metavar="OUT", help="the folder to write")
    export.add_argument(
        "--users", action="store_true", help="with the histories of all users, and what their clients keep"
    )
    export.add_argument("--index", action="store_true", help="with an approximate index of item vectors")
    export.add_argument("--onnx", action="store_true", help="with ONNX files of what scores, where they can be")
    export.add_argument("--platforms", default="cpu,cuda,tpu", help="what functions are lowered for (cpu,cuda,tpu)")
    export.add_argument("--replace", action="store_true", help="replace an export that is there")


def export_command(args: argparse.Namespace) -> None:
    """jaxfed export"""
    from pathlib import Path

    from jaxfed.export.bundle import PLATFORMS, export_run

    platforms = [word.strip() for word in args.platforms.split(",")]
    if unknown := [word for word in platforms if word not in PLATFORMS]:
        raise ValueError(f"--platforms: no platform {unknown[0]!r}: choose of {', '.join(PLATFORMS)}")
    asked = {"users": args.users, "index": args.index, "onnx": args.onnx, "platforms": platforms}
    manifest = export_run(args.run, Path(args.out), replace=args.replace, **asked)
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(f"{args.out}: {', '.join(manifest['functions'])}; {manifest['num_items']:,} items, {size / 1e6:.1f} MB")
    if "index" in manifest:
        print(f"the index finds {manifest['index']['recall@10']:.1%} of the ten items nearest to an item")
    for name, reason in manifest.get("onnx", {}).get("refused", {}).items():
        print(f"no {name}.onnx: {reason}")
