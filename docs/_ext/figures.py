"""The directive `figures`: rows of the table of results, and the commands that made them.

Its content is the names of rows of configs/results/ml100k.json, one a line.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from jaxfed.bench.reproduce import table_markdown

RESULTS = Path(__file__).parents[2] / "configs" / "results" / "ml100k.json"


class Figures(SphinxDirective):
    """See above."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The nodes of the table and of the list of commands. Raises an error for a row that is not there."""
        self.env.note_dependency(str(RESULTS))
        rows = {row["name"]: row for row in json.loads(RESULTS.read_text())}
        if missing := [name for name in self.content if name not in rows]:
            raise self.error(f"figures: no row {missing[0]!r} in {RESULTS.name}")
        chosen = [rows[name] for name in self.content]
        text = table_markdown(chosen) + "\nMade by\n\n```\n" + "\n".join(row["command"] for row in chosen) + "\n```\n"
        box = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), source=str(RESULTS)), self.content_offset, box)
        return box.children


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("figures", Figures)
    return {"parallel_read_safe": True}
