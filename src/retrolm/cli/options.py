"""Options that several commands share, written down once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, get_type_hints

import typer

from ..config import RetroConfig
from ..errors import UserError, unknown
from .knob_settings import plain_settings, split_knobs
from .settings import parse_settings

DEFAULT_MODEL = "smollm2-135m-instruct"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_PANEL = "Model and KV budget"
_DEFAULTS = RetroConfig()
_OWN_OPTIONS = {
    "kv_budget": "--kv-budget",
    "page_size": "--page-size",
    "chunk_pages": "--chunk-pages",
    "device_kv_bytes": "--device-kv-gb",
}

SourceArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="Text to read (.txt, .md, .html, .pdf), or - for standard input.")
]
HostCapOption = Annotated[
    float | None,
    typer.Option("--host-kv-gb", help="Cap on KV in host memory, in GB; the rest goes to a file in the folder for "
                 "temporary files ($TMPDIR).", show_default="none", rich_help_panel=_PANEL),
]  # fmt: skip
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]


def _option(*names: str, help: str, default: Any = True) -> Any:
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=_PANEL)


@dataclass(frozen=True)
class EngineOptions:
    """How the engine is set up; the fields are the options of every command that loads a model."""

    model: Annotated[str, _option(help="Name of a pulled model, a folder, or a Hugging Face id.")] = DEFAULT_MODEL
    retriever: Annotated[
        str, _option(help="Trained page retriever: a folder, a shipped one, auto (the one for this model), or none.")
    ] = "auto"
    adapter: Annotated[
        str, _option(help="LoRA adapter: a folder (stage 2, or PEFT's), a shipped one, auto (the one for this model), "
                     "or none.")
    ] = "none"  # fmt: skip
    method: Annotated[str, _option(help="How the budget is spent (see `retrolm methods`).")] = "retrolm"
    kv_budget: Annotated[int, _option(help="Tokens attended per layer.")] = _DEFAULTS.kv_budget
    page_size: Annotated[
        int | None, _option(help="Tokens per page.", default=f"the retriever's, else {_DEFAULTS.page_size}")
    ] = None
    chunk_pages: Annotated[int, _option(help="Pages encoded at once; changes speed, not results. 0 = what suits.")] = (
        _DEFAULTS.chunk_pages
    )
    device_kv_gb: Annotated[
        float | None, _option(help="Cap on KV kept on the device, in GB; the rest stays in host memory.",
                              default="none")
    ] = None  # fmt: skip
    dtype: Annotated[str, _option(help=f"Arithmetic of the model: {', '.join(DTYPES)}.")] = "auto"
    max_new_tokens: Annotated[int, _option(help="Longest answer, in tokens.")] = 64
    settings: Annotated[
        list[str], _option("--set", help="Option of RetroConfig (key=value) or of the method (METHOD.knob=value); "
                           "may be repeated.", default=False)
    ] = field(default_factory=list)  # fmt: skip

    def config(self) -> RetroConfig:
        """The engine's configuration; raises `UserError` for what is unknown or out of range."""
        further = parse_settings(plain_settings(self.settings))
        for key, option in _OWN_OPTIONS.items():
            if key in further:
                raise UserError(f"{key} has an option of its own. Use {option} instead of --set {key}=…")
        named = {"kv_budget": self.kv_budget, "chunk_pages": self.chunk_pages}
        if self.page_size is not None:
            named["page_size"] = self.page_size
        cap = whole_bytes("--device-kv-gb", self.device_kv_gb)
        return RetroConfig.from_options({**named, "device_kv_bytes": cap, **further})

    def stated(self) -> dict[str, Any]:
        """The configuration as options of `RetroLM.from_pretrained`; a page size that isn't given is left to it."""
        found = asdict(self.config())
        if self.page_size is None:
            del found["page_size"]
        return found

    def method_options(self) -> dict[str, Any]:
        """Knobs of the method; raises `UserError` for knobs of another one."""
        found = split_knobs(self.settings)[1]
        for name in found:
            if name != self.method:
                raise UserError(f"--set {name}.… sets a knob of {name!r}, but --method is {self.method!r}.")
        return found.get(self.method, {})

    def check(self) -> None:
        """Refuse what can be refused before a model is loaded; raises `UserError`."""
        self.config()
        self.method_options()
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}.")


def whole_bytes(option: str, gigabytes: float | None) -> int | None:
    """Bytes of an option in GB, None without it; raises `UserError` unless it is a positive number."""
    if gigabytes is None:
        return None
    if not 0 < gigabytes < 1e6:  # refuses nan and infinity as well
        raise UserError(f"{option} must be a positive number of GB, got {gigabytes}.")
    return int(gigabytes * 1e9)


def with_engine_options(**defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a command with a parameter `engine: EngineOptions` take all its fields as options.

    Args:
        defaults: values that differ from those of `EngineOptions` in this command.
    """
    return with_options(engine=EngineOptions(**defaults))


def with_options(**groups: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a command take the fields of its dataclass parameters as options.

    Args:
        groups: parameter of the command -> an instance of its dataclass, whose values are the defaults.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        names = {group: [item.name for item in dataclasses.fields(plain)] for group, plain in groups.items()}

        @functools.wraps(function)
        def command(**values: Any) -> Any:
            built = {
                group: type(plain)(**{name: values.pop(name) for name in names[group]})
                for group, plain in groups.items()
            }
            return function(**built, **values)

        parameters = _own_parameters(function, groups)
        for plain in groups.values():
            parameters += _group_parameters(plain)
        del command.__wrapped__  # its parameters are not the command's
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _own_parameters(function: Callable[..., Any], groups: Collection[str]) -> list[inspect.Parameter]:
    found = inspect.signature(function, eval_str=True).parameters.values()
    return [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found if p.name not in groups]


def _group_parameters(plain: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(type(plain), include_extras=True)
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(plain, name), annotation=hint)
        for name, hint in hints.items()
    ]
