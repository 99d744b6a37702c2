"""Plain text out of a user's file: .txt and .md as they are, .html and .pdf by a library, others if they decode."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError

READABLE = "UTF-8 text (.txt, .md), .html and .pdf can be read"


def read_text_file(path: str | Path) -> str:
    """Return the text of a file, line ends as "\\n" and without a byte order mark.

    Raises `UserError` for a file that is missing, a folder, unreadable, empty, only whitespace, binary, not UTF-8 or
    (.html, .pdf) damaged or without text, and where the library for its kind is not installed.
    """
    file = Path(path)
    return text_of(_read_bytes(file), name=file.name or str(file), suffix=file.suffix.lower())


def read_stdin() -> str:
    """Return standard input as text, under the same rules as a text file."""
    return text_of(sys.stdin.buffer.read(), name="standard input", suffix="")


def text_of(data: bytes, *, name: str, suffix: str) -> str:
    """Return the text in `data`, read as the kind of file that `suffix` says; raises `UserError` naming `name`."""
    if not data:
        raise UserError(f"{name} is empty. Give a file with text in it.")
    text = READERS.get(suffix, decode_text)(data, name)
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode()  # no lone surrogates
    if not text.strip():
        raise UserError(f"{name} holds no text, only whitespace.{HINTS.get(suffix, '')}")
    return text


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark; raises `UserError` for binary data and other encodings."""
    if b"\0" in data:
        raise UserError(f"{name} is binary, not text (it has NUL bytes); {READABLE}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}). Convert it, for example "
            f"with: iconv -f latin1 -t utf-8"
        ) from None


def html_text(data: bytes, name: str) -> str:
    """Return the visible text of an HTML page: one line per item, an empty line between paragraphs."""
    try:
        import bs4
    except ImportError:
        raise _missing("beautifulsoup4", name) from None
    source = decode_text(data, name)
    with _damage_told(name, "HTML"):
        page = bs4.BeautifulSoup(source, "html.parser")
        for hidden in page(["script", "style", "template", "noscript", "head"]):
            hidden.decompose()
        _spell_out_layout(page)
        text = page.get_text()  # leaves comments and the doctype out
    return re.sub(r"[ \t]*\v[ \t\v]*", "\n", re.sub(r"\s*\f\s*", "\n\n", text)).strip()


def _spell_out_layout(page: Any) -> None:
    # source line ends mean nothing in HTML; \v and \f mark ends of lines and paragraphs until all are known
    for string in page.find_all(string=True):
        if string.find_parent("pre") is None and type(string).__name__ == "NavigableString":
            string.replace_with(re.sub(r"\s+", " ", string))
    for mark, names in (("\v", LINES), ("\f", PARAGRAPHS)):
        for tag in page(names):
            tag.insert_before(mark)
            tag.insert_after(mark)
    for cell in page(["td", "th"]):
        cell.insert_after("\t")


def pdf_text(data: bytes, name: str) -> str:
    """Return the text layer of a PDF, pages parted by an empty line."""
    try:
        import pypdf
    except ImportError:
        raise _missing("pypdf", name) from None
    with _quiet("pypdf"), _damage_told(name, "PDF"):
        reader = pypdf.PdfReader(io.BytesIO(data))
        return "\n\n".join(page.extract_text().strip() for page in reader.pages)


READERS: dict[str, Callable[[bytes, str], str]] = {
    ".html": html_text,
    ".htm": html_text,
    ".xhtml": html_text,
    ".pdf": pdf_text,
}
HINTS = {".pdf": " A scanned PDF needs text recognition (OCR) first."}
LINES = ("div", "li", "tr", "dt", "dd", "br", "figcaption", "address", "form", "nav", "aside", "caption", "option")
PARAGRAPHS = (
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "table", "ul", "ol", "dl", "hr"),
    *("section", "article", "header", "footer", "main"),
)


def _read_bytes(file: Path) -> bytes:
    try:
        if file.is_dir():
            raise UserError(f"{file} is a folder. Give one file; {READABLE}.")
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no file {file}. Check its name and the folder you are in.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(file)!r} can't be opened: {_one_line(reason)}.") from None


def _missing(package: str, name: str) -> UserError:
    return UserError(f"Reading {name} needs the package {package}. Install it: pip install 'retrolm[documents]'")


@contextmanager
def _damage_told(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file makes the parsers raise nearly anything
        raise UserError(
            f"{name} can't be read as {kind}: {type(error).__name__} ({_one_line(str(error))}). Is it damaged or "
            f"encrypted?"
        ) from error


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    # pypdf warns about every irregular file, which would bury the one clear line
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:200]
