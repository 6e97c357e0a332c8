"""Docstrings of this package are plain text with `names` in single backticks; this makes reStructuredText of them.

What would be a mark there (a star, a bar, an underscore at the end of a word) is escaped, indented blocks that are no
section become literal blocks, and lists of `name(arguments): what` become lists.
"""

import re
from typing import Any

SECTIONS = re.compile(
    r"(Args|Attributes|Example|Examples|Note|Notes|Raises|Returns|Source|Yields|References|Units):\s*$"
)


def escape_marks(line: str) -> str:
    """A line whose text in backticks is literal, and whose other text means nothing to reStructuredText."""
    parts = re.split(r"(`[^`]+`)", line)
    for i, part in enumerate(parts):
        if i % 2:
            around = "" if not parts[i + 1][:1].isalnum() else "\\ "
            parts[i] = f"``{part[1:-1].strip()}``{around}"
        else:
            parts[i] = re.sub(r"([\\*|`])|_(?!\w)", lambda found: "\\" + found[0], part)
    return "".join(parts)


def indent_of(line: str) -> int:
    """Number of spaces that a line begins with."""
    return len(line) - len(line.lstrip())


def convert_paragraph(lines: list[str]) -> list[str]:
    """A paragraph outside of the sections."""
    if lines[0].lstrip().startswith(">>>"):
        return lines
    if all(indent_of(line) >= 4 for line in lines):
        return ["::", "", *(f"    {line}" for line in lines)]
    if any(indent_of(line) for line in lines):  # each line with those indented below it is an item
        made: list[str] = []
        for line in lines:
            made.append(("  " if indent_of(line) else "* ") + escape_marks(line.strip()))
        return made
    if lines[0].lstrip().startswith(("- ", "* ")):
        return ["* " + escape_marks(line.strip()[2:]) if line[:2] in ("- ", "* ") else "  " + escape_marks(line.strip())
                for line in lines]  # fmt: skip
    return [escape_marks(line) for line in lines]


def convert_section(lines: list[str]) -> list[str]:
    """A section with its heading: Google's form, which napoleon reads; doctests stay as they are."""
    return [line if line.lstrip().startswith((">>>", "...")) else escape_marks(line) for line in lines]


def convert_docstring(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    made: list[str] = []
    paragraph: list[str] = []
    section = False
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        if paragraph:
            section = bool(SECTIONS.match(paragraph[0])) or (section and indent_of(paragraph[0]) > 0)
            made += [*(convert_section if section else convert_paragraph)(paragraph), ""]
        paragraph = []
    return made


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Changes the lines in place, before napoleon reads them."""
    lines[:] = convert_docstring(lines)


def skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of NamedTuples, whose docstring says only which number they have."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True}
