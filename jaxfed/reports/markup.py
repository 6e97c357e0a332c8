"""HTML from text: everything that comes from files is escaped here."""

import html
from collections.abc import Sequence

from jaxfed.core.excerpt import printable

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --soft: #59636e; --rule: #d1d9e0; --head:
  #f3f5f7; --c0: #0b62b5; --c1: #b34100; --c2: #1a7f37; --c3: #8250df; --c4: #a40e5a; --c5: #00707f; --c6: #7a5b00;
  --c7: #57606a; }
@media (prefers-color-scheme: dark) {
:root { --back: #11151a; --text: #e6edf3; --soft: #a2adb8; --rule: #3a434d; --head: #1c222a; --c0: #6cb6ff; --c1:
  #ffa061; --c2: #6fdd8b; --c3: #c8a6ff; --c4: #ff8ac0; --c5: #56d4dd; --c6: #e3c04d; --c7: #adb7c2; }
}
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width:
  72rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h1, h2, li, td, tbody th { overflow-wrap: anywhere; }
td, tbody th { min-width: 5em; }
a { color: var(--c0); }
nav ul, ul.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; list-style: none; padding: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.8rem 0; }
caption { text-align: left; color: var(--soft); padding: 0.3rem 0; }
th, td { border: 1px solid var(--rule); padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; min-width:
  4rem; }
thead th { background: var(--head); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.leaky { font-weight: bold; color: var(--c1); }
figure { margin: 1.2rem 0; }
figcaption { font-weight: 600; }
figure > svg { width: 100%; max-width: 50rem; height: auto; display: block; }
svg.key { width: 1rem; height: 1rem; margin-right: 0.3rem; vertical-align: -0.15rem; }
.grid { stroke: var(--rule); fill: none; }
.tick, .label { fill: var(--text); font-size: 12px; }
.line { fill: none; stroke: var(--c); stroke-width: 2; }
.mark { fill: var(--c); stroke: var(--back); stroke-width: 0.7; }
.bar { fill: var(--c); stroke: var(--back); }
.series-0 { --c: var(--c0); }
.series-1 { --c: var(--c1); }
.series-2 { --c: var(--c2); }
.series-3 { --c: var(--c3); }
.series-4 { --c: var(--c4); }
.series-5 { --c: var(--c5); }
.series-6 { --c: var(--c6); }
.series-7 { --c: var(--c7); }
"""
GENERATOR = "jaxfed report"
OWN_MARKS = (  # by which files are known that jaxfed wrote
    f'<meta name="generator" content="{GENERATOR}">'.encode(),
    f"Software\0{GENERATOR}".encode(),  # of PNG
    f"<dc:title>{GENERATOR}</dc:title>".encode(),  # of SVG by matplotlib
)


def escape_text(text: object) -> str:
    """Text that shows as it is on a page, in an attribute too: marks of HTML are escaped, and control characters are
    shown by their escapes."""
    return html.escape(printable(str(text)), quote=True)


def table_html(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], labels: int = 1) -> str:
    """A table with a caption, heads of its columns, and the first column as heads of its lines.

    Args:
        title: the caption.
        heads: of the columns.
        lines: of text.
        labels: how many columns, from the first, are words. The others are right aligned.
    """
    top = "".join(f'<th scope="col">{escape_text(head)}</th>' for head in heads)
    body = []
    for line in lines:
        first = f'<th scope="row">{mark_leaky_text(line[0])}</th>'
        cells = (
            f"<td{' class=number' * (place >= labels)}>{escape_text(c)}</td>" for place, c in enumerate(line) if place
        )
        body.append(f"<tr>{first}{''.join(cells)}</tr>")
    caption = f"<caption>{mark_leaky_text(title)}</caption>"
    table = f"<table>{caption}<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape_text(title)}">{table}</div>'


def mark_leaky_text(text: str) -> str:
    """Escaped text whose mark LEAKY is seen at once."""
    return escape_text(text).replace("LEAKY", '<strong class="leaky">LEAKY</strong>')


def page_html(title: str, sections: Sequence[tuple[str, str]], lead: str = "") -> str:
    """A whole page that needs nothing else: no script, no network.

    Args:
        title: of the page.
        sections: (heading, HTML) of each.
        lead: HTML before the first section.
    """
    links = "".join(f'<li><a href="#part-{n}">{escape_text(head)}</a></li>' for n, (head, _) in enumerate(sections))
    parts = "".join(
        f'<section aria-labelledby="part-{n}"><h2 id="part-{n}">{escape_text(head)}</h2>{body}</section>'
        for n, (head, body) in enumerate(sections)
    )
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="generator" content="{GENERATOR}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape_text(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{escape_text(title)}</h1>{lead}"
        f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav>{parts}</main></body>\n</html>\n'
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()  # the same in whatever encoding it is written
