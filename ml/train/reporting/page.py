"""A page that holds everything in itself: sober, without scripts or network, on light and on dark screens."""

import dataclasses
from collections.abc import Mapping, Sequence

from ml.train.reporting.figure import FONTS, colour_variables

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light dark; }
{{ variables | safe }}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1160px; padding: 2.2rem 1.4rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 {{ fonts | safe }};
}
h1 { font-size: 1.65rem; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
.lead { color: var(--grey); margin: 0.2rem 0 1.5rem; }
.lead b { color: var(--ink); font-weight: 600; }
.lead .bad { color: var(--red); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0.7rem; }
.tile, figure, .table { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
.tile { padding: 0.65rem 0.9rem; }
.tile dt { color: var(--grey); font-size: 0.8rem; }
.tile dd { margin: 0; font-size: 1.2rem; font-weight: 620; font-variant-numeric: tabular-nums; }
.tiles, .pictures { margin: 0 0 1.2rem; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.9rem; }
figure { margin: 0; padding: 0.8rem 0.9rem 0.6rem; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; }
figcaption small { color: var(--grey); font-weight: 400; font-size: 0.84rem; margin-left: 0.5rem; }
figure svg { display: block; width: 100%; height: auto; margin-top: 0.3rem; }
figure svg text { font-family: inherit !important; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 0.6rem; }
.table { overflow-x: auto; padding: 0.3rem 0.9rem; margin-bottom: 0.8rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.28rem 0.9rem 0.28rem 0; border-bottom: 1px solid var(--grid); }
th { color: var(--grey); font-weight: 500; vertical-align: bottom; }
tr:last-child td { border-bottom: none; }
td:first-child { white-space: nowrap; }
td { overflow-wrap: anywhere; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; white-space: nowrap; }
details > summary { cursor: pointer; font-weight: 600; padding: 0.25rem 0; }
details { margin-bottom: 0.4rem; }
.key { display: inline-block; width: 1.1em; height: 0.28em; border-radius: 2px; margin-right: 0.5em;
       vertical-align: middle; }
@media (max-width: 760px) { .pictures { grid-template-columns: 1fr; } }
@media print { body { max-width: none; } details:not([open]) { display: none; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
<p class="lead">{% for text, emphasis in page.lead -%}
{% if emphasis %}<span class="{{ emphasis }}">{{ text }}</span>{% else %}{{ text }}{% endif %}
{%- if not loop.last %} · {% endif %}{% endfor %}</p>
{% if page.tiles %}<dl class="tiles">
{% for name, value in page.tiles.items() %}<div class="tile"><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% endif %}<div class="pictures">
{% for picture in page.pictures %}<figure{% if picture.wide %} class="wide"{% endif %}>
<figcaption>{{ picture.title }}{% if picture.note %}<small>{{ picture.note }}</small>{% endif %}</figcaption>
{{ picture.svg | safe }}
</figure>
{% endfor %}</div>
{% for table in page.tables %}{% if table.folded %}<details><summary>{{ table.title }}</summary>
{% else %}<h2>{{ table.title }}</h2>
{% endif %}<div class="table"><table{% if table.numbers %} class="numbers"{% endif %}>
{% if table.header %}<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% endif %}{% for row in table.rows %}{% set colour = table.colours and table.colours[loop.index0] %}<tr>
{% for cell in row %}<td>{% if loop.first and colour -%}
<span class="key" style="background: var(--{{ colour }})"></span>{% endif %}{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% if table.folded %}</details>
{% endif %}{% endfor %}</body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of a page: its title, an ``<svg>`` (of `ml.train.reporting.figure.to_svg`), a remark, its width."""

    title: str
    svg: str
    note: str = ""
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
      title: above it.
      rows: of cells, as text.
      header: of the columns; empty: none.
      folded: whether it is closed until it is opened.
      numbers: whether all columns but the first hold numbers.
      colours: of each row, names of the page's variables (`ml.train.reporting.figure.THEMED`); empty: none.
    """

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    folded: bool = False
    numbers: bool = False
    colours: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Page:
    """All of it.

    Attributes:
      title: of the page.
      lead: the line below: texts, each with ``""`` or the class that it stands out by: ``bad``.
      tiles: name -> figure.
      pictures, tables: in their order.
    """

    title: str
    lead: Sequence[tuple[str, str]]
    tiles: Mapping[str, str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]


def to_html(page: Page) -> str:
    """The page as one file; all text is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE).render(page=page, variables=colour_variables(), fonts=FONTS)
