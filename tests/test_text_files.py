"""Reading text files: every kind that is supported, and one clear line for everything else."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrolm.engine.text_files import READERS, read_stdin, read_text_file, text_of
from retrolm.errors import UserError

SUFFIXES = ["", ".txt", ".md", ".rst", *READERS]
PAGE = """<!doctype html><html><head><title>Not this</title><style>p {}</style></head><body><!-- nor this -->
<h1>A <b>bold</b> head</h1><p>One
 two <i>three</i>.<br>Four &amp; five.</p>
<ul><li>x</li> <li>y</li></ul><script>nor(this)</script><pre>def f():
    return 1</pre><table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table></body></html>"""


def simple_pdf(lines: list[str]) -> bytes:
    """Write a PDF of one page with these ASCII lines, by hand."""
    content = "BT /F1 12 Tf 20 700 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body, offsets = "%PDF-1.4\n", []
    for number, entry in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{entry}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    xref = f"xref\n0 6\n0000000000 65535 f \n{table}trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return (body + xref).encode("ascii")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ""])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_text_is_read_as_utf8(tmp_path: Path, suffix: str, start: bytes) -> None:
    file = tmp_path / f"book{suffix}"
    file.write_bytes(start + "Naïve — 東京\r\nsecond\rthird\n".encode())
    assert read_text_file(file) == read_text_file(str(file)) == "Naïve — 東京\nsecond\nthird\n"


def test_html_becomes_its_visible_text(tmp_path: Path) -> None:
    file = tmp_path / "page.HTML"
    file.write_text(PAGE)
    blocks = ["A bold head", "One two three.\nFour & five.", "x\ny", "def f():\n    return 1", "a\tb\nc"]
    assert read_text_file(file) == "\n\n".join(blocks)


def test_pdf_becomes_its_text_layer(tmp_path: Path) -> None:
    file = tmp_path / "paper.pdf"
    file.write_bytes(simple_pdf(["The tower is 117 feet high", "and stands in Lyme"]))
    assert read_text_file(file).split("\n") == ["The tower is 117 feet high", "and stands in Lyme"]


def test_a_pdf_without_text_says_why(tmp_path: Path) -> None:
    (tmp_path / "scan.pdf").write_bytes(simple_pdf([]))
    with pytest.raises(UserError, match=r"scan\.pdf holds no text.*OCR"):
        read_text_file(tmp_path / "scan.pdf")


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".txt", b"", "is empty"),
        (".pdf", b"", "is empty"),
        (".txt", b" \n\t\r\n", "only whitespace"),
        (".txt", b"\xef\xbb\xbf", "only whitespace"),
        (".html", b"<html><body> </body></html>", "only whitespace"),
        (".txt", b"abc\0def", "binary"),
        (".bin", bytes(range(256)), "binary"),
        (".md", "caf\xe9".encode("latin-1"), r"not UTF-8 text \(byte 3 is 0xe9\).*iconv"),
        (".html", "<p>caf\xe9".encode("latin-1"), "not UTF-8"),
        (".pdf", b"not a pdf at all", "can't be read as PDF"),
    ],
)
def test_bad_content_is_one_clear_line(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\{suffix}.*{message}") as info:
        read_text_file(file)
    assert "\n" not in str(info.value)


def test_missing_files_and_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_text_file(tmp_path)
    for name in ("missing.txt", "no/such/file", "x" * 5000, "nul\0byte"):
        with pytest.raises(UserError, match=r"no file|can't be opened"):
            read_text_file(tmp_path / name)


@pytest.mark.parametrize(("suffix", "package"), [(".pdf", "pypdf"), (".html", "bs4")])
def test_a_missing_library_is_named(suffix: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fail(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if name == package:
            raise ImportError(name)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(UserError, match=r"pip install 'retrolm\[documents\]'"):
        text_of(b"text", name=f"a{suffix}", suffix=suffix)


def test_standard_input_follows_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("naïve\r\n".encode())))
    assert read_stdin() == "naïve\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(UserError, match="standard input is empty"):
        read_stdin()


def check_text_or_user_error(data: bytes, suffix: str) -> None:
    try:
        text = text_of(data, name="file", suffix=suffix)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert text.strip() and "\r" not in text
        text.encode("utf-8")


@given(data=st.binary(max_size=400), suffix=st.sampled_from(SUFFIXES))
@example(data=b"<![if", suffix=".html")
@example(data=b"<p>&#xD800;", suffix=".html")
def test_any_bytes_are_text_or_a_user_error(data: bytes, suffix: str) -> None:
    check_text_or_user_error(data, suffix)


@given(
    st.lists(
        st.sampled_from(["<p>", "</p>", "<!--", "-->", "<pre>", "<![CDATA[", "]]>", "<br/>", "&#0;", "<a b='", "x\n"])
    )
)
def test_any_html_is_text_or_a_user_error(pieces: list[str]) -> None:
    check_text_or_user_error("".join(pieces).encode(), ".html")


@given(position=st.integers(0, 1000), cut=st.integers(0, 60), noise=st.binary(max_size=20))
def test_a_damaged_pdf_is_text_or_a_user_error(position: int, cut: int, noise: bytes) -> None:
    whole = simple_pdf(["Some text"])
    check_text_or_user_error(whole[:position] + noise + whole[position + cut :], ".pdf")


@given(st.text(min_size=1).filter(str.strip))
def test_utf8_text_comes_back_as_it_was(text: str) -> None:
    clean = text.replace("\0", "").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if clean.strip():
        assert text_of(b"\xef\xbb\xbf" + clean.encode(), name="file", suffix=".txt") == clean
