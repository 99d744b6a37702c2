"""`retrolm plan`: what reading a file will take, before it is read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .loading import load_engine, read_source, require_pages, source_name
from .options import EngineOptions, HostCapOption, JsonFlag, SourceArgument, with_engine_options
from .screen import OUT, count, print_json, seconds, show_table, size, waiting

if TYPE_CHECKING:
    from ..engine.model import RetroLM
    from ..engine.plan import Plan
    from ..store.layout import StoreBytes

QUESTION = "What is this text about?"


@with_engine_options()
def command(
    engine: EngineOptions,
    file: SourceArgument,
    host_kv_gb: HostCapOption = None,
    as_json: JsonFlag = False,
) -> int:
    """Say what reading a text will take: tokens, pages, memory, time. The text is counted, not read.

    Sizes follow from the text and the model; speed and working memory are measured on one chunk of pages, which takes
    a few seconds. Exits with 1 if the memory isn't there.
    """
    engine.check()
    require_pages(engine, "plan")
    text = read_source(file)
    from ..engine.plan import look_around, plan
    from ..engine.preflight import check_questions, count_tokens

    before = look_around()
    lm = load_engine(engine, host_kv_gb)
    num_tokens = count_tokens(lm, text)
    check_questions(lm, num_tokens, [QUESTION])
    with waiting("Measuring one chunk …"):
        expected = plan(lm, num_tokens, QUESTION, before)
    if as_json:
        print_json({"file": file, **plan_json(engine.model, lm, expected)})
    else:
        show_plan(source_name(file), engine.model, lm, expected, "reading")
    return 0 if expected.fits else 1


def plan_json(model: str, lm: RetroLM, expected: Plan) -> dict[str, Any]:
    """What is expected; keys are stable."""
    return {
        "model": model,
        "method": lm.method.name,
        "retriever": lm.retriever_name,
        "kv_budget": lm.config.kv_budget,
        "page_size": lm.config.page_size,
        **asdict(expected),
        "tokens_per_s": expected.tokens_per_s,
        "fits": expected.fits,
    }


def show_plan(name: str, model: str, lm: RetroLM, expected: Plan, reading: str) -> None:
    """Print what is expected; `reading` is what the time for reading is called."""
    config, kv = lm.config, expected.kv_bytes
    on_gpu = lm.device.type == "cuda"
    rows = [
        ("tokens", count(expected.num_tokens), f"in {count(expected.num_pages)} pages of {config.page_size}"),
        ("attended", count(min(config.kv_budget, expected.num_tokens)), "tokens per layer at most"),
        ("weights", size(expected.weights_bytes), f"{model}, {str(lm.backbone.dtype).removeprefix('torch.')}"),
        ("page store", size(kv.device + kv.host + kv.disk), _places(kv)),
        ("page index", size(expected.index_bytes), "what pages are chosen by"),
        ("working set", size(expected.working_bytes), "activations, gathered pages, compact cache"),
        ("program", size(expected.program_bytes), "Python and libraries"),
    ]
    if on_gpu:
        rows.append(("GPU peak", size(expected.device_bytes), f"of {size(expected.free_device_bytes)} free"))
    rows += [
        ("memory peak", size(expected.host_bytes), f"of {size(expected.free_host_bytes)} free"),
        (reading, seconds(expected.read_s), f"{count(expected.tokens_per_s)} tokens/s"),
        ("answering", seconds(expected.ttft_s), f"to the first token, then {1 / expected.tpot_s:.1f} tokens/s"),
    ]
    show_table(("expected", "", ""), rows, title=name, right=(1,))
    if not expected.fits:
        OUT.print("\nThis doesn't fit what is free. Try --set store_dtype=bfloat16, --host-kv-gb, or a smaller model.")


def _places(kv: StoreBytes) -> str:
    on_disk = f", {size(kv.disk)} disk" if kv.disk else ""
    return f"{size(kv.device)} device, {size(kv.host)} host{on_disk}"
