"""The report in a real browser (`make test-browser`, which names the browser's Python in BROWSER_PYTHON).

Not named test_*: it needs an environment with a browser of some hundred megabytes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from report_rows import made_up_rows
from retrolm.evaluation.journal import write_lines
from retrolm.evaluation.report.write import write_report
from retrolm.evaluation.runner import SAMPLES_FILE


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some columns have long names, as those of other settings do."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("report")
    settings = "agreement_layers=12, word_weight=0.5, whole_sentences=False, page_positions=true_for_questions"
    rows = [{**row, "settings": settings if row["method"] == "retrolm" else ""} for row in made_up_rows()]
    write_lines(run / SAMPLES_FILE, rows)
    write_report([run], out)
    return out


@pytest.fixture(scope="module")
def opened(report: Path) -> dict[str, Any]:
    """What the browser says of the page; its picture lies beside the report."""
    command = [os.environ["BROWSER_PYTHON"], str(Path(__file__).with_name("open_page.py"))]
    command += [str(report / "report.html"), str(report / "seen.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_all_of_it_is_there(opened: dict[str, Any]) -> None:
    assert opened["title"].startswith("RetroLM") and "Overview: mean over tasks" in opened["headings"]
    assert len(opened["images"]) >= 4 and all(image["width"] > 500 and image["alt"] for image in opened["images"])
    assert len(opened["tables"]) >= 4 and all(table["rows"] >= 2 for table in opened["tables"])
    assert opened["console"] == []


def test_it_fits_the_window(opened: dict[str, Any]) -> None:
    """Wide tables scroll by themselves, and the column of names leaves room for the figures beside it."""
    assert opened["scroll_width"] <= opened["width"]
    assert all(300 < image["shown"] <= opened["width"] for image in opened["images"])
    assert all(table["name_width"] < opened["width"] / 3 for table in opened["tables"])


def test_something_is_drawn(opened: dict[str, Any], report: Path) -> None:
    seen = matplotlib.image.imread(report / "seen.png")
    assert seen.shape[:2] == (900, 1200)
    assert 0.01 < (seen[..., :3].mean(-1) < 0.5).mean() < 0.5  # dark letters on a light page
