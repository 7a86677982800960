"""A page of text, tables and pictures: one HTML file that holds everything, or Markdown with a folder of files.

A page is a list of blocks; what they look like is decided when it is written.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from crystaljax.files import make_folder, replace_bytes, replace_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2, h3 { line-height: 1.2 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
th { border-bottom-color: #888 }
.scroll { overflow-x: auto }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; max-width: 100% }
.pictures figure { width: 12rem; font-size: .85rem }
img { max-width: 100% }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .8rem }
"""


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: of its file, without a suffix; unique on the page.
        attached: name and text of a file to download, if there is one.
    """

    name: str
    png: bytes
    caption: str
    attached: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Small pictures side by side."""

    pictures: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Folded:
    """Long text as it is, folded away behind its title."""

    title: str
    text: str


Block = Heading | Text | Table | Picture | Pictures | Folded


def write(path: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write a page in the format that its name says.

    Raises:
        ValueError: for a name that ends neither in ``.html`` nor in ``.md``.
    """
    _writer(path)(path, title, blocks)


def check_name(path: Path) -> None:
    """Raise what :func:`write` would, before there is anything to write."""
    _writer(path)


def _writer(path: Path) -> Callable[[Path, str, Sequence[Block]], None]:
    writers = {".html": _write_html, ".md": _write_markdown}
    if path.suffix.lower() not in writers:
        raise ValueError(f"a report is written as HTML or Markdown, so {path} must end in .html or .md")
    return writers[path.suffix.lower()]


def _write_html(path: Path, title: str, blocks: Sequence[Block]) -> None:
    body = "\n".join(_html(block) for block in (Heading(title, 1), *blocks))
    replace_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n",
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Table(header, rows):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
        case Picture(_, png, caption, attached):
            image = f'<img src="{_data("image/png", png)}" alt="{escape(caption)}">'
            below = escape(caption)
            if attached:
                name, text = attached
                link = _data("chemical/x-cif", text.encode())
                below += f' <a download="{escape(name)}" href="{link}">{escape(name)}</a>'
            return f"<figure>{image}<figcaption>{below}</figcaption></figure>"
        case Pictures(pictures):
            return '<div class="pictures">\n' + "\n".join(map(_html, pictures)) + "\n</div>"
        case Folded(title, text):
            return f"<details><summary>{escape(title)}</summary>\n<pre>{escape(text)}</pre></details>"


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _write_markdown(path: Path, title: str, blocks: Sequence[Block]) -> None:
    folder = make_folder(path.with_name(f"{path.stem}_files"))
    text = "\n\n".join(_markdown(block, folder) for block in (Heading(title, 1), *blocks))
    replace_text(path, text + "\n")


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escaped(text)}"
        case Text(text):
            return re.sub(r"^(\d*)([-+=#:.)])", r"\1\\\2", escaped(text))  # neither a list nor a heading
        case Table(header, rows):
            lines = [list(map(escaped, header)), ["---"] * len(header), *(map(escaped, row) for row in rows)]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Picture(name, png, caption, attached):
            name = re.sub(r"[^A-Za-z0-9-]+", "_", name)  # it becomes a path
            replace_bytes(folder / f"{name}.png", png)
            below, link = escaped(caption), f"{quote(folder.name)}/{name}"
            if attached:
                replace_text(folder / f"{name}.cif", attached[1])
                below += f" [{escaped(attached[0])}]({link}.cif)"
            return f"![{escaped(name)}]({link}.png)\n\n{below}"
        case Pictures(pictures):
            return "\n\n".join(_markdown(picture, folder) for picture in pictures)
        case Folded(title, text):
            # Longer than any row of backquotes in the text, which cannot end it then.
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"<details><summary>{escape(title)}</summary>\n\n{fence}\n{text}\n{fence}\n\n</details>"


def escaped(text: str) -> str:
    """A text for a line of Markdown that is shown as it is: no markup, no HTML, no end of the line or of a cell."""
    return re.sub(r"([\\`*<>|~$&]|\](?=[\[(:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(text.split()))
