"""The model card of an export (Mitchell et al. 2019, "Model cards for model reporting"): README.md in its folder."""

from pathlib import Path
from typing import Any

from jaxfed.core.excerpt import printable
from jaxfed.evaluation.split import DECILES
from jaxfed.training.records import LEAKY_NOTE, describe_figure

SHOWN = ("hr@10", "ndcg@10", "mrr", "auc", "rmse", "log_loss")  # last words of the figures of quality
COSTS = ("bytes_up_per_client", "bytes_down_per_client", "bytes_up_total", "bytes_down_total", "seconds")
SEEN = {
    "update+rows": "each client's update, and which items it holds",
    "update": "each client's update",
    "sum+union": "the sum of a cohort's updates, and which items its clients hold together",
    "sum": "the sum of a cohort's updates",
}


def write_card(path: Path, manifest: dict[str, Any], summary: dict[str, Any]) -> None:
    """Writes the model card.

    Args:
        path: the file.
        manifest: of the export, but for its files.
        summary: of the run; empty where it has not finished.
    """
    configuration = manifest["configuration"]
    lines = [
        f"# {configuration.get('model', {}).get('name', 'Recommender')}, trained with jaxfed",
        "",
        "A recommender that was trained by simulated federated learning. `manifest.json` says what each function takes "
        "and gives, and has the SHA-256 of each file. `python load.py . ITEM ITEM` recommends with jax, numpy and "
        "flatbuffers alone.",
        *(["", f"**{LEAKY_NOTE}.**"] if manifest["leaky"] else []),
        *list_section("Data", describe_sources(manifest, summary)),
        *list_section("Quality", describe_quality(summary)),
        *list_section("Privacy", describe_privacy(summary)),
        *list_section("Costs of training", describe_costs(summary)),
        *list_section("Versions", [f"{name} {number}" for name, number in manifest["versions"].items()]),
        "",
    ]
    path.write_text("\n".join(map(printable, lines)), encoding="utf-8")


def list_section(title: str, lines: list[str]) -> list[str]:
    """A heading and a list below it."""
    return ["", f"## {title}", "", *(f"* {line}" for line in lines)]


def describe_sources(manifest: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """What the model was trained on, and how rows were held out."""
    data = manifest["configuration"].get("data", {})
    found = [f"source: {data.get('name', 'given by a program')}", f"{manifest['num_items']:,} items"]
    found += [f"held-out rows: {manifest['protocol']}"]
    if summary.get("negatives"):
        found.append(f"sampled figures rank a held-out item among: {summary['negatives']}")
    if summary.get("data_sha256"):
        found.append(f"SHA-256 of the rows: {summary['data_sha256']}")
    return found


def describe_quality(summary: dict[str, Any]) -> list[str]:
    """Figures of the test; and by activity, as one number hides who is served badly."""
    if not summary:
        return ["the run has not finished: there are no figures of a test"]
    found = []
    for name, value in summary.items():
        part, _, rest = name.partition("/")
        if part == "test" and rest.split("/")[-1] in SHOWN and isinstance(value, int | float):
            found.append(f"{name}: {value:.4f} ({describe_figure(name).rstrip('.')})")
            deciles = [summary[key] for i in range(1, DECILES + 1) if (key := f"{name}/decile_{i}") in summary]
            if deciles:
                by_activity = " ".join(f"{one:.3f}" for one in deciles)
                found.append(f"{name} by tenths of the clients, the least active first: {by_activity}")
    return found or ["no figures of a test are on record"]


def describe_privacy(summary: dict[str, Any]) -> list[str]:
    """What the server learnt, and what is guaranteed."""
    sees = summary.get("server_sees")
    found = [f"the server saw {SEEN.get(sees, sees)}"] if sees else []
    if summary.get("epsilon") is not None:
        found.append(f"differential privacy: epsilon {summary['epsilon']:.3g} at delta {summary['delta']:.3g}")
        found += [f"note: {summary['privacy']['note']}"] if (summary.get("privacy") or {}).get("note") else []
    else:
        found.append("no differential privacy: the weights may tell of the people whose data they were trained on")
    return found


def describe_costs(summary: dict[str, Any]) -> list[str]:
    """Bytes and seconds."""
    return [f"{name}: {summary[name]:,}" for name in COSTS if name in summary] or ["not on record"]
