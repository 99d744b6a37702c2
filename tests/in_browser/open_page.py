"""Open a page in the Chromium of Qt, without a screen: `python open_page.py PAGE PICTURE`.

Prints one JSON object: what the page is like once it has loaded, and what its console said. Runs in an environment of
its own (`make test-browser`), which has nothing of RetroLM.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # as root there is none
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--disable-gpu")

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

WIDTH, HEIGHT, SECONDS = 1200, 900, 60
PAGE_FACTS = """JSON.stringify({
  title: document.title,
  headings: [...document.querySelectorAll("h1, h2")].map(heading => heading.textContent),
  images: [...document.images].map(image => ({alt: image.alt, width: image.naturalWidth, shown: image.clientWidth})),
  tables: [...document.querySelectorAll("table")].map(table => ({
    rows: table.rows.length,
    name_width: Math.max(...[...table.rows].map(row => row.cells[0].clientWidth))
  })),
  width: innerWidth,
  scroll_width: document.documentElement.scrollWidth
})"""


class Page(QWebEnginePage):
    """A page that keeps what its console says."""

    said: list[str]

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:  # noqa: N802
        self.said.append(message)


def main(page_file: str, picture_file: str) -> int:
    app = QApplication(sys.argv[:1])
    view, page = QWebEngineView(), Page()
    page.said = []
    view.setPage(page)
    view.resize(WIDTH, HEIGHT)

    def report(facts: str) -> None:
        view.grab().save(picture_file)
        print(json.dumps({**json.loads(facts), "console": page.said}), flush=True)
        app.quit()

    def loaded(well: bool) -> None:
        if well:
            QTimer.singleShot(500, lambda: page.runJavaScript(PAGE_FACTS, 0, report))  # when it has been drawn
        else:
            app.exit(1)

    view.loadFinished.connect(loaded)
    QTimer.singleShot(SECONDS * 1000, lambda: app.exit(1))
    view.load(QUrl.fromLocalFile(page_file))
    view.show()
    return int(app.exec())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
