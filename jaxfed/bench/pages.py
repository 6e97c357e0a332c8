"""Tables in pages of the documentation: between two markers, so that what stands around them is left alone."""

from pathlib import Path

from jaxfed.training.log import log
from jaxfed.training.run_dir import write_file


def replace_table(text: str, name: str, table: str) -> str:
    """The text of a page with another table between the markers of `name`.

    Args:
        text: the page.
        name: what its first marker says: `<!-- table: NAME -->`; the second one is `<!-- end -->`.
        table: the table in Markdown, which ends with a newline.

    Returns:
        The page, in which nothing else has changed.

    Raises:
        ValueError: the markers are missing.

    Example:
        >>> replace_table("<!-- table: a -->\\nold\\n<!-- end -->", "a", "new\\n")
        '<!-- table: a -->\\nnew\\n<!-- end -->'
    """
    begin, end = f"<!-- table: {name} -->", "<!-- end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the markers {begin} and {end} are missing")
    return f"{head}{begin}\n{table}{end}{tail}"


def find_table_place(page: Path, name: str) -> Path | None:
    """The page, if the table has a place there; says so if not."""
    try:
        replace_table(page.read_text(), name, "")
    except (ValueError, OSError) as error:
        log(f"{page}: {error}, so the table is not written there")
        return None
    return page


def write_page(page: str | None, name: str, table: str) -> None:
    """Writes a table into a page, if there is one and the table has a place there; says so if not."""
    if page and (place := find_table_place(Path(page), name)):
        write_file(place, replace_table(place.read_text(), name, table))
