"""Synthetic questions from an OpenAI-compatible endpoint, against a local server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from retrolm.errors import UserError
from retrolm.training.data.generate import Endpoint, Segment, ask, generate_pairs, refusal, segments
from retrolm.training.data.readers import read_pairs
from retrolm.training.data.rows import Document, RowCounts
from stage1_pool_maker import book_text

Answer = Callable[[dict[str, Any]], tuple[int, Any]]
DOCUMENTS = [Document(f"book {n}", book_text(n, 60)) for n in range(5)]


@contextmanager
def server(answer: Answer) -> Iterator[tuple[Endpoint, list[tuple[dict[str, Any], dict[str, str]]]]]:
    """Run a chat-completions server; `answer` maps a request to (status, content or whole body)."""
    seen: list[tuple[dict[str, Any], dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((body, {**dict(self.headers), "path": self.path}))
            status, content = answer(body)
            whole = content if isinstance(content, dict) else {"choices": [{"message": {"content": content}}]}
            data = json.dumps(whole).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            """Keep the test output quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/v1/"
        yield Endpoint(url, "writer", "STAGE1_TEST_KEY", timeout_s=10, retries=2, retry_delay_s=0.0), seen
        running.shutdown()


def good_answer(request: dict[str, Any]) -> tuple[int, str]:
    """A question made of the evidence's first words."""
    evidence = request["messages"][0]["content"].split("<evidence>\n")[1]
    return 200, f'"Which places did {" ".join(evidence.split()[:2])} visit on the way?"\n'


def test_pairs_are_written_and_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE1_TEST_KEY", "secret")
    out = tmp_path / "made" / "pairs.jsonl"
    with server(good_answer) as (endpoint, seen):
        counts = generate_pairs(DOCUMENTS, endpoint, out, num_pairs=9, parallel=2)
    body, headers = seen[0]
    assert headers["path"] == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "writer" and body["max_tokens"] == 128
    rows = list(read_pairs(out, "flagembedding", "made", RowCounts()))
    assert len(rows) == counts.written == 9
    for row in rows:
        assert row.answers[0] in row.positives[0].text and row.query.endswith("way?")
    assert "secret" not in out.read_text() and not list(out.parent.glob("*.partial"))


def test_parallel_requests_keep_the_order(tmp_path: Path) -> None:
    with server(good_answer) as (endpoint, _):
        for parallel in (1, 4):
            generate_pairs(DOCUMENTS, endpoint, tmp_path / f"{parallel}.jsonl", num_pairs=10, parallel=parallel)
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "4.jsonl").read_text()


def test_a_broken_off_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    budget = [5]

    def failing(request: dict[str, Any]) -> tuple[int, Any]:
        budget[0] -= 1
        return good_answer(request) if budget[0] >= 0 else (401, {"error": "no credit"})

    with server(failing) as (endpoint, _), pytest.raises(UserError, match=r"answered 401 .*no credit"):
        generate_pairs(DOCUMENTS, endpoint, out, num_pairs=10, parallel=1)
    partial = tmp_path / "pairs.jsonl.partial"
    with partial.open("a") as stream:
        stream.write('{"id": "half a li')
    assert not out.exists()
    with server(good_answer) as (endpoint, seen):
        assert generate_pairs(DOCUMENTS, endpoint, out, num_pairs=10, parallel=1).written == 10
    with server(good_answer) as (endpoint, _):
        generate_pairs(DOCUMENTS, endpoint, tmp_path / "whole.jsonl", num_pairs=10, parallel=1)
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert len(seen) < 10


def test_busy_servers_are_asked_again() -> None:
    answers = iter([(503, {}), (429, {}), (200, "Who came to Riga first?")])
    with server(lambda request: next(answers)) as (endpoint, seen):
        assert ask(endpoint, "prompt") == "Who came to Riga first?"
    assert len(seen) == 3


def test_failures_are_said_in_one_line() -> None:
    with server(lambda request: (500, {"error": "down"})) as (endpoint, seen), pytest.raises(UserError, match="500"):
        ask(endpoint, "prompt")
    assert len(seen) == 3
    with server(lambda request: (200, {"odd": 1})) as (endpoint, _), pytest.raises(UserError, match="chat-completions"):
        ask(endpoint, "prompt")
    with pytest.raises(UserError, match="can't be reached"):
        ask(Endpoint("http://127.0.0.1:9/v1", "writer", retries=0, timeout_s=2), "prompt")


def test_useless_answers_are_refused(tmp_path: Path) -> None:
    segment = Segment("Ada Abbott walked from Riga to Minsk with a lantern.", "Ada Abbott walked from Riga.")
    for question, reason in [
        ("NONE", "no question possible"),
        ("Why?", "length"),
        ("Ada Abbott walked away from Riga.", "not a question"),
        ("Where does the passage say Abbott went?", "speaks of the passage"),
        ("Where did he go on this day?", "shares no word with the background"),
        ("Ada Abbott walked from Riga to Minsk?", "copied"),
        ("Which town did Ada Abbott leave?", None),
    ]:
        assert refusal(question, segment) == reason
    with server(lambda request: (200, "NONE")) as (endpoint, _), pytest.raises(UserError, match="No question"):
        generate_pairs(DOCUMENTS, endpoint, tmp_path / "none.jsonl", num_pairs=3)


def test_repeated_questions_are_refused(tmp_path: Path) -> None:
    with server(lambda request: (200, "Which of them walked with a lantern?")) as (endpoint, _):
        counts = generate_pairs(DOCUMENTS, endpoint, tmp_path / "one.jsonl", num_pairs=3)
    assert counts.written == 1 and counts.refused["duplicate"] + counts.refused.total() > 1


def test_segments_are_reproducible_and_nested() -> None:
    found = list(segments(DOCUMENTS, 3, seed=1))
    assert found == list(segments(DOCUMENTS, 3, seed=1)) != list(segments(DOCUMENTS, 3, seed=2))
    assert all(s.evidence in s.background and len(s.background.split()) >= 100 for s in found)
    assert list(segments([Document("short", "Too short.")], 3, seed=1)) == []
