"""Options of transformers' `generate`: which make sense over a compact cache, and what they ask for."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..errors import UserError, suggest, unknown
from .decode_reading import LOOKAHEAD
from .stop_criteria import StopNote, StopWhen, stop_strings
from .token_choice import TokenChoice

DECODING = ("auto", "fast", "plain")
_ARGUMENTS = ("generation_config", "logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria", "streamer")
_OWN = ("tokenizer", "decoding", "decode_ahead")
_MAX_NEW_TOKENS = 64
_DEFAULT_TOP_K = 50  # transformers' own
_OURS = "RetroLM builds the cache and its inputs itself. Leave it out."
_ONE_AT_A_TIME = "Generating several tokens per step isn't supported over a compact cache. Leave it out."
_TENSOR_OUT = "RetroLM returns token ids. Look at scores with a logits_processor."
_RULED_OUT = {
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"), _OURS),
    **dict.fromkeys(("cache", "past_key_values", "use_cache", "cache_implementation", "cache_config"), _OURS),
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "custom_generate"), _ONE_AT_A_TIME),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), _TENSOR_OUT),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _TENSOR_OUT),
    **dict.fromkeys(("max_length", "min_length"), "Use max_new_tokens and min_new_tokens."),
    "token_healing": "It changes the prompt's last token, which is already read. Leave it out.",
}
# What the engine's own decoding loop understands, or what changes no token there.
_LOOP_KNOWS = {
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation"),
    *("cache_config", "max_cache_len", "max_length", "min_length", "early_stopping", "length_penalty", "low_memory"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("transformers_version", "compile_config", "disable_compile", "generation_config", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size", "prefill_chunk_size"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "continuous_batching_config"),
}
# Values that switch a further option off.
_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale"), (1,)),
    **dict.fromkeys(("repetition_penalty", "typical_p"), (1.0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "diversity_penalty", "epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing", "use_mtp"), (False,)),
}


class GenerateOptions:
    """Checked options of one call.

    Args:
        options: as for transformers' `generate`.
        eos_ids, pad_id: tokens that end and fill a sequence unless an option says otherwise.
        tokenizer: for `stop_strings`; may be None.

    Attributes:
        eos_ids, pad_id: what came of them. num_sequences: rows that generation keeps per prompt.
        max_new_tokens: what the generation config says; the caller's own number goes before it.
        keeps_rows: whether row i stays row i while generating (not so in beam search).
        decoding: "plain" = transformers' `generate`; "auto" = the engine's own loop over a compact cache of fixed
            shape where it applies and pays, which is on a GPU (the default); "fast" = that or an error.
        decode_ahead: tokens that this loop may generate on a GPU before the first of them is read and put to the
            criteria; what lies behind a stop is thrown away. 0 = none, for criteria that change what follows.

    Raises:
        UserError: an unknown option, or one that can't be honoured.
    """

    def __init__(
        self, model: Any, options: dict[str, Any], eos_ids: tuple[int, ...], pad_id: int, tokenizer: Any
    ) -> None:
        self._model = model
        self._options = {key: value for key, value in options.items() if key not in _OWN}
        self.decoding = options.get("decoding", "auto")
        if self.decoding not in DECODING:
            raise UserError(f"decoding={self.decoding!r} is not a choice.{suggest(str(self.decoding), DECODING)}")
        self.decode_ahead = options.get("decode_ahead", LOOKAHEAD)
        if not isinstance(self.decode_ahead, int) or self.decode_ahead < 0:
            raise UserError(f"decode_ahead must be a whole number from 0 on, got {self.decode_ahead!r}.")
        self._check()
        found = self._value("eos_token_id") if self._given("eos_token_id") else list(eos_ids)
        self.eos_ids = tuple(found) if isinstance(found, list) else () if found is None else (int(found),)
        beams = int(self._value("num_beams") or 1)
        self.num_return_sequences = int(self._value("num_return_sequences") or 1)
        self.max_new_tokens = int(self._value("max_new_tokens") or _MAX_NEW_TOKENS)
        self.num_sequences = max(beams, self.num_return_sequences)
        self.keeps_rows = beams == 1
        own_pad = self._options.pop("pad_token_id", None)
        self.pad_id = pad_id if own_pad is None else int(own_pad)
        self.streamer = self._options.pop("streamer", None)
        self._criteria = list(self._options.pop("stopping_criteria", None) or [])
        strings = self._options.pop("stop_strings", None)
        if strings:
            self._criteria.append(stop_strings(options.get("tokenizer", tokenizer), strings))
        self._processors = list(self._options.pop("logits_processor", None) or [])

    def call(self, num_tokens: int, processor: Any, streamer: BaseStreamer | None) -> Call:
        """Arguments for one call of `generate`; `processor` sees the logits first."""
        settings: dict[str, Any] = {"max_new_tokens": num_tokens, "pad_token_id": self.pad_id}
        settings["eos_token_id"] = list(self.eos_ids) or None
        arguments = dict(self._options)
        if "generation_config" in arguments:
            config = copy.deepcopy(arguments["generation_config"])
            config.update(**settings)
            arguments["generation_config"] = config
        else:
            arguments.update(settings)
        stop = StopNote(self._criteria)
        arguments["logits_processor"] = [processor, *self._processors]
        if self._criteria:
            arguments["stopping_criteria"] = [stop]
        if streamer is not None:
            arguments["streamer"] = streamer
        return Call(arguments, stop)

    def loop_obstacle(self) -> str | None:
        """What in these options only transformers' `generate` can do; None if the engine's own loop can do it all."""
        # One that says that it needs no ids neither waits for the device nor minds what is thrown away behind a stop.
        needs_ids = any(getattr(processor, "needs_ids", True) for processor in self._processors)
        if needs_ids or self._options.get("prefix_allowed_tokens_fn") is not None:
            return "a logits processor"
        names = {*vars(GenerationConfig()), *self._options} - {"transformers_version"}
        for name in sorted(name for name in names if not name.startswith("_") and name not in _LOOP_KNOWS):
            value = self._value(name)
            if value is not None and value not in _OFF.get(name, ()):
                return f"{name}={value!r}"
        return None

    def loop_settings(self) -> dict[str, Any]:
        """What these options say about a `DecodeRequest`."""
        return {
            "choice": self.token_choice(),
            "pad_id": self.pad_id,
            "criteria": self.criteria,
            "ahead": self.decode_ahead,
            "stopped": self.stopped,
        }

    def token_choice(self) -> TokenChoice:
        """How the engine's own loop chooses tokens."""
        return TokenChoice(
            sample=bool(self._value("do_sample")),
            temperature=self._value("temperature"),
            top_k=self._defaulted("top_k", _DEFAULT_TOP_K),
            top_p=self._value("top_p"),
            eos_ids=self.eos_ids,
            min_new_tokens=int(self._value("min_new_tokens") or 0),
            processors=tuple(self._processors),
        )

    def stopped(self) -> bool:
        """Whether a stop was asked for from outside (`StopWhen`)."""
        return any(criterion.is_set for criterion in self._criteria if isinstance(criterion, StopWhen))

    @property
    def criteria(self) -> list[Any]:
        """Stopping criteria but for stops from outside, those of `stop_strings` last."""
        return [criterion for criterion in self._criteria if not isinstance(criterion, StopWhen)]

    def _defaulted(self, name: str, default: Any) -> Any:
        """An option's value where transformers has a default of its own for options that nobody set."""
        value = self._value(name)
        return default if value is None and name not in self._options else value

    def _check(self) -> None:
        allowed = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in _RULED_OUT]
        for key, value in self._options.items():
            if key in _RULED_OUT and not (key == "use_cache" and value):
                raise UserError(f"The generation option {key!r} can't be used here. {_RULED_OUT[key]}")
            if key not in allowed and key not in _ARGUMENTS and key != "use_cache":
                raise unknown("generation option", key, [*allowed, *_ARGUMENTS, *_OWN])

    def _given(self, name: str) -> bool:
        config = self._options.get("generation_config")
        return name in self._options or getattr(config, name, None) is not None

    def _value(self, name: str) -> Any:
        """What an option comes to: given, from the given generation config, or the model's own."""
        if name in self._options:
            return self._options[name]
        given = getattr(self._options.get("generation_config"), name, None)
        return getattr(self._model.generation_config, name, None) if given is None else given


class Call:
    """Arguments for one call of `generate`, and where its rows stopped."""

    def __init__(self, arguments: dict[str, Any], stop: StopNote) -> None:
        self.arguments = arguments
        self.stop = stop


class OneStream(BaseStreamer):
    """Passes several calls of `generate` on to one streamer: one prompt, one end."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._prompts = 0
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._prompts += 1
        if not self._is_prompt or self._prompts == 1:
            self._streamer.put(value)
        self._is_prompt = False

    def end(self) -> None:
        """One call ended; the next begins with its prompt."""
        self._is_prompt = True

    def close(self) -> None:
        """The last call ended."""
        self._streamer.end()
