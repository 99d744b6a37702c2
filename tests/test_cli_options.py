"""The option space: whatever is given ends in a result or in one line and exit code 2."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cli_runner import Desk, run_cli
from retrolm.cli.options import DTYPES, EngineOptions
from retrolm.cli.settings import parse_settings
from retrolm.config import RetroConfig
from retrolm.errors import UserError
from retrolm.methods import METHODS

SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FIELDS = [item.name for item in dataclasses.fields(RetroConfig)]
VALUES = st.one_of(
    st.sampled_from(["true", "false", "none", "recent", "mean_key", "full", "page", "float32", "bfloat16", ""]),
    st.integers(-3, 200).map(str),
    st.text(max_size=8),
)
VALID = [
    *("strict_budget=false", "num_local_pages=0", "num_local_pages=2", "first_layer_mode=mean_key", "prefix_page=no"),
    *("first_layer_mode=full", "num_skip_layers=2", "bookmark_span=page", "score_rope=yes", "causal_selection=on"),
    "bookmarks=visible",
    *("retrieve_every=2", "store_dtype=bfloat16", "store_dtype=none"),
]
PRINTABLE = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.lists(st.one_of(PRINTABLE, st.builds("{}={}".format, st.sampled_from(FIELDS), VALUES)), max_size=4))
@example(["retrieve_every=32", "strict-budget=off", "device_kv_bytes=none"])
def test_settings_become_a_config_or_a_user_error(pairs: list[str]) -> None:
    try:
        config = RetroConfig.from_options(parse_settings(pairs))
    except UserError:
        return
    given_keys = {pair.partition("=")[0].strip().replace("-", "_") for pair in pairs}
    plain = RetroConfig()
    assert all(getattr(config, name) == getattr(plain, name) for name in FIELDS if name not in given_keys)


def test_settings_take_the_type_of_their_field() -> None:
    parsed = parse_settings(["retrieve_every=32", "strict-budget=off", "store_dtype=None", "bookmark_span=page"])
    assert parsed == {"retrieve_every": 32, "strict_budget": False, "store_dtype": None, "bookmark_span": "page"}


@given(
    kv_budget=st.integers(),
    page_size=st.integers(),
    chunk_pages=st.integers(),
    device_kv_gb=st.none() | st.floats(),
    dtype=st.sampled_from(DTYPES) | PRINTABLE,
    max_new_tokens=st.integers(),
)
@example(kv_budget=384, page_size=128, chunk_pages=1, device_kv_gb=1.5, dtype="auto", max_new_tokens=1)
def test_engine_options_are_checked_or_refused(
    kv_budget: int, page_size: int, chunk_pages: int, device_kv_gb: float | None, dtype: str, max_new_tokens: int
) -> None:
    options = EngineOptions(
        kv_budget=kv_budget,
        page_size=page_size,
        chunk_pages=chunk_pages,
        device_kv_gb=device_kv_gb,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
    )
    try:
        options.check()
    except UserError as error:
        assert "\n" not in str(error)
        return
    config = options.config()
    assert config.kv_budget >= 3 * config.page_size > 0
    assert device_kv_gb is None or config.device_kv_bytes == int(device_kv_gb * 1e9)


@SLOW
@given(
    kv_budget=st.integers(40, 400),
    page_size=st.integers(0, 40),
    chunk_pages=st.integers(0, 40),
    max_new_tokens=st.integers(0, 5),
    method=st.sampled_from([*METHODS, "quest"]),
    pairs=st.lists(st.sampled_from([*VALID, "retrieve_every=-1"]), max_size=2),
)
@example(kv_budget=96, page_size=16, chunk_pages=3, max_new_tokens=3, method="retrolm", pairs=["retrieve_every=2"])
def test_ask_answers_or_refuses(
    desk: Desk, kv_budget: int, page_size: int, chunk_pages: int, max_new_tokens: int, method: str, pairs: list[str]
) -> None:
    numbers = {"--kv-budget": kv_budget, "--page-size": page_size, "--chunk-pages": chunk_pages}
    words = [f"{name}={value}" for name, value in numbers.items()]
    words += [f"--set={pair}" for pair in pairs] + [f"--max-new-tokens={max_new_tokens}", f"--method={method}"]
    outcome = run_cli("ask", desk.text, "Who?", "--json", "--model", desk.model, *words)
    if outcome.code == 0:
        assert outcome.json["kv_budget"] == kv_budget
    else:
        outcome.refused_in_one_line()


@SLOW
@given(st.lists(PRINTABLE, max_size=5))
@example(["ask"])
@example(["--", "ask"])
@example(["models", "--json", "--", "x"])
def test_any_words_end_in_help_a_result_or_one_line(words: list[str]) -> None:
    outcome = run_cli(*words)
    assert outcome.code in (0, 2)
    if outcome.code:
        outcome.refused_in_one_line()


@pytest.mark.parametrize("text", ["true", "Yes", "ON", "1"])
def test_booleans_are_read_as_people_write_them(text: str) -> None:
    assert parse_settings([f"causal_selection={text}"]) == {"causal_selection": True}
