"""Inputs for a model of transformers, from its forward's signature and its configuration."""

import inspect
import itertools
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS = 2, 12


def first_that_runs(
    model: nn.Module, candidates: Iterable[dict[str, Any]], seconds: float = float("inf")
) -> tuple[dict[str, Any] | None, Exception | None]:
    """The first arguments that a model's forward takes.

    Args:
        model: any module; it is run without gradients, and global random generators are left as they are.
        candidates: arguments by name.
        seconds: of computing, after which no more are tried.

    Returns:
        The arguments, or None and what the forward raised for the first ones; None for both without candidates.
    """
    first: Exception | None = None
    end = time.process_time() + seconds
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for given in candidates:
            try:
                torch.manual_seed(0)
                model(**given)
            except Exception as error:
                first = first or error
            else:
                return given, None
            if time.process_time() > end:
                break
    return None, first


class InputMaker:
    """Makes arguments for models of text, images and sound, encoder-decoders among them.

    Args:
        model: a model of transformers or a part of one.
        config: of the model; None takes its own.
        ids: tokens to take, of shape ``(2, n)``; None takes random ones that are not special.
    """

    def __init__(self, model: nn.Module, config: Any = None, ids: Tensor | None = None) -> None:
        self.model, self.ids = model, ids
        self.config = getattr(model, "config", None) if config is None else config
        self.parameters = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(1)
        self.tokens = TOKENS if ids is None else ids.shape[1]

    def floats(self, *shape: int) -> Tensor:
        """Normal random numbers."""
        return torch.randn(shape, generator=self.generator)

    def ints(self, high: int, *shape: int) -> Tensor:
        """Random integers from 0 to below a bound."""
        return torch.randint(0, max(high, 1), shape, generator=self.generator)

    # Sizes

    def field(self, *names: str, default: Any = None, kind: type | tuple[type, ...] = int) -> Any:
        """The first of these fields that the configuration or one of its parts has."""
        configs = [self.config, *_parts(self.config)]
        for config, name in itertools.product(configs, names):
            value = getattr(config, name, None)
            if isinstance(value, kind) and not isinstance(value, bool) and value != [] and value != ():
                return value
        return default

    def words(self, tokens: int | None = None, name: str = "vocab_size") -> Tensor:
        """Tokens of a shape ``(2, tokens)``."""
        tokens = self.tokens if tokens is None else tokens
        if self.ids is not None and name == "vocab_size":
            return self.ids.repeat(1, -(-tokens // self.ids.shape[1]))[:, :tokens]
        high = self.field(name, "vocab_size", default=100)
        special = set(_special_tokens(self.config))
        allowed = torch.tensor(
            [token for token in range(min(high, 90)) if token not in special and token > 3] or [0]
        )
        return allowed[self.ints(len(allowed), BATCH, tokens)]

    def sides(self) -> list[tuple[int, int]]:
        """Heights and widths of images, the likeliest first."""
        size = self.field("image_size", "img_size", "input_size", "crop_size", kind=(int, list, tuple, dict))
        if isinstance(size, dict):
            size = (size.get("height", 64), size.get("width", 64))
        if isinstance(size, list | tuple) and size and isinstance(size[0], int):
            size = (size[0], size[-1])
        if isinstance(size, tuple) and not isinstance(size[-1], int):
            size = None
        first = (
            [(size, size)]
            if isinstance(size, int) and size > 1
            else [size]
            if isinstance(size, tuple)
            else []
        )
        patch = self.field("patch_size", default=16, kind=(int, list, tuple))
        patch = patch if isinstance(patch, int) else patch[-1] if isinstance(patch[-1], int) else 16
        return [*first, (4 * patch, 4 * patch), (64, 64), (128, 128), (224, 224)]

    def channels(self) -> int:
        """Number of channels of an image."""
        return self.field("num_channels", "in_channels", "in_chans", "input_channels", default=3)

    def width(self, *names: str) -> int:
        """Width of hidden states."""
        return self.field(*names, "hidden_size", "d_model", "embed_dim", default=64)

    # Candidates

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Arguments for the model's forward, the likeliest first."""
        main = getattr(self.model, "main_input_name", None)
        for kind in self._kinds(main if isinstance(main, str) else None):
            yield from getattr(self, f"_feed_{kind}")()

    def _kinds(self, main: str | None) -> list[str]:
        names = set(self.parameters)
        kinds = []
        if "pixel_values" in names and "input_ids" in names and "bbox" not in names:
            kinds.append("image_text")
        if "input_ids" in names:
            kinds.append("text")
        if names & {"pixel_values", "pixel_values_videos", "video_pixels", "images"}:
            kinds.append("image")
        if names & {"input_features", "input_values", "audio_values", "spectrogram"}:
            kinds.append("audio")
        first = self._main_kind(main, kinds)
        return sorted(kinds, key=lambda kind: kind != first)

    def _main_kind(self, main: str | None, kinds: list[str]) -> str:
        order = {
            "pixel_values": "image",
            "input_features": "audio",
            "input_values": "audio",
            "input_ids": "text",
        }
        first = order.get(main or "", "")
        return "image_text" if first == "text" and "image_text" in kinds else first

    def _decoder(self) -> dict[str, Any]:
        if "decoder_input_ids" in self.parameters:
            return {"decoder_input_ids": self.words(7)}
        return {}

    def _required(self, given: dict[str, Any]) -> dict[str, Any]:
        """Fill what the forward demands and a kind does not make."""
        filled = dict(given)
        for name, parameter in self.parameters.items():
            if name in filled or parameter.default is not inspect.Parameter.empty:
                continue
            if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                continue
            filled[name] = self._extra(name)
        return filled

    def _extra(self, name: str) -> Any:
        n = self.tokens
        kind = self.parameters[name].annotation if name in self.parameters else None
        if "attention_mask" in name or name in ("mask", "padding_mask"):
            return torch.ones(BATCH, n, dtype=torch.long)
        if name in ("position_ids", "positions"):
            return torch.arange(n).expand(BATCH, n)
        if name == "bbox":
            return torch.tensor([1, 2, 10, 20]).expand(BATCH, n, 4).contiguous()
        if "list[" in str(kind) and is_states(name):
            # Maps of several scales, the finest first; the coarsest has as many places as there are tokens.
            width = self.width()
            return [self.floats(BATCH, width, 3 * scale, 4 * scale) for scale in (4, 2, 1)]
        if "encoder_hidden_states" in name:
            return self._encoder_states()["encoder_hidden_states"]
        if name.endswith("input_ids"):
            return self.words(7)
        if name == "merge_sizes":
            return torch.ones(2, dtype=torch.long)
        if is_states(name) or "embeds" in name or "states" in name:
            return self._hidden()
        return None

    def _hidden(self) -> Tensor:
        return self.floats(BATCH, self.tokens, self.width())

    def _feed_text(self) -> Iterator[dict[str, Any]]:
        ids = {"input_ids": self.words()}
        if "bbox" in self.parameters:
            ids["bbox"] = self._extra("bbox")
        decoder = self._decoder()
        text = {**ids, **decoder}
        if "attention_mask" in self.parameters:
            # The end of the last sequence is padding, so that masks count.
            mask = torch.ones(BATCH, self.tokens, dtype=torch.long)
            mask[-1, -3:] = 0
            yield self._required({**text, "attention_mask": mask})
        yield self._required(text)
        if "attention_mask" in self.parameters:
            yield self._required({**text, "attention_mask": torch.ones(BATCH, self.tokens, dtype=torch.long)})
        for tokens in (16, 32, 64, 128):
            yield self._required({**text, "input_ids": self.words(tokens)})
        yield self._required({"input_ids": self.ints(2, BATCH, self.tokens) + 1, **decoder})
        codebooks = self.field(
            "num_codebooks", "n_codebooks", "num_code_groups", "num_channels", "channels", default=2
        )
        several = {
            **text,
            "input_ids": self.words(self.tokens * codebooks).reshape(BATCH, self.tokens, codebooks),
        }
        yield self._required(several)
        if "encoder_hidden_states" in self.parameters:
            yield self._required({**several, **self._encoder_states()})
        yield self._required(
            {**text, "input_ids": self.words(self.tokens * codebooks).reshape(BATCH * codebooks, self.tokens)}
        )
        yield self._required(
            {**text, "input_ids": self.words(self.tokens * codebooks).reshape(BATCH, codebooks, self.tokens)}
        )
        if "inputs_embeds" in self.parameters:
            yield self._required({"inputs_embeds": self.floats(BATCH, self.tokens, self.width()), **decoder})

    def _feed_image(self) -> Iterator[dict[str, Any]]:
        for name in ("pixel_values", "pixel_values_videos", "video_pixels", "images"):
            if name not in self.parameters:
                continue
            for height, width in self.sides():
                c = self.channels()
                image = {name: self.floats(BATCH, c, height, width), **self._decoder()}
                yield self._required(image)
                if "labels" in self.parameters and "prompt_pixel_values" in self.parameters:
                    yield self._required(
                        {**image, "prompt_pixel_values": image[name], "prompt_masks": image[name]}
                    )
                frames = self.field("num_frames", "frames", "frames_per_clip", default=4)
                yield self._required({name: self.floats(BATCH, frames, c, height, width)})
                yield self._required({name: self.floats(BATCH, c, frames, height, width)})
                yield self._required({name: self.floats(BATCH, 1, c, height, width)})

    def _feed_image_text(self) -> Iterator[dict[str, Any]]:
        for height, width in self.sides()[:2]:
            image = {"pixel_values": self.floats(BATCH, self.channels(), height, width)}
            tokens = (getattr(self.config, f"image_token_{name}", None) for name in ("id", "index"))
            token = next((one for one in tokens if isinstance(one, int)), None)
            if token is None or self.field("image_seq_length", "num_image_tokens") is None:
                yield self._required({"input_ids": self.words(), **image, **self._decoder()})
                if token is None:
                    continue
            patch = self.field("patch_size", default=16)
            patch = patch if isinstance(patch, int) else 16
            guesses = [
                self.field("image_seq_length"),
                self.field("mm_tokens_per_image"),
                self.field("num_image_tokens"),
                (height // patch) * (width // patch),
                (height // patch // 2) * (width // patch // 2),
                (height // patch) * (width // patch) + 1,
            ]
            for count in dict.fromkeys(g for g in guesses if isinstance(g, int) and 0 < g < 1024):
                ids = torch.cat([self.words(4), torch.full((BATCH, count), token), self.words(4)], 1)
                yield self._required({"input_ids": ids, **image, **self._decoder()})

    def _feed_audio(self) -> Iterator[dict[str, Any]]:
        mel = self.field("num_mel_bins", "n_mels", "input_feat_size", "feature_size", "input_feat_per_channel",
                         "n_mel_bins", "input_dim", "num_mel_bins", "mel_dim", default=80)  # fmt: skip
        conv = [module.in_channels for module in self.model.modules() if isinstance(module, nn.Conv1d)]
        mels = list(dict.fromkeys([mel, *self._linear_widths(), *conv[:1]]))
        positions = self.field("max_source_positions", default=64)
        for name in ("input_features", "input_values", "audio_values", "spectrogram"):
            if name not in self.parameters:
                continue
            lengths = (2 * positions, 2 * self.field("n_window", default=32), 64, 200, 256, 1024)
            raw = (3840, 16000, *lengths[1:])
            for length, mel in itertools.product(lengths if name == "input_features" else raw, mels):
                shapes = [(BATCH, mel, length), (BATCH, length, mel), (BATCH, length), (BATCH, 1, length),
                          (BATCH, 1, length, mel), (BATCH, 1, mel, length), (BATCH, 2, length)]  # fmt: skip
                if name == "input_values":
                    shapes = [shapes[2], shapes[3], shapes[0], shapes[1], *shapes[4:]]
                for shape in shapes:
                    given = {name: self.floats(*shape), **self._decoder()}
                    if "input_ids" in self.parameters:
                        given["input_ids"] = self.words()
                    yield self._required(given)
                    for mask in ("attention_mask", "input_features_mask", "feature_attention_mask"):
                        if mask in self.parameters and len(shape) == 3:
                            for axis in (-1, 1):
                                ones = torch.ones(BATCH, shape[axis], dtype=torch.long)
                                yield self._required({**given, mask: ones})
                                yield self._required({**given, mask: ones.bool()})

    def _encoder_states(self) -> dict[str, Any]:
        if "encoder_hidden_states" not in self.parameters:
            return {}
        names = ("encoder_hidden_size", "cross_attention_hidden_size", "cross_hidden_size")
        return {"encoder_hidden_states": self.floats(BATCH, 5, self.width(*names))}

    def _linear_widths(self) -> list[int]:
        return [module.in_features for module in self.model.modules() if isinstance(module, nn.Linear)][:2]


_STATES_NAME = re.compile(
    r"(embeds|states?|features|queries|context|latents|pos_encoding|position_encoding)$", re.IGNORECASE
)


def is_states(name: str) -> bool:
    """Whether an argument holds hidden states, by its name: not what asks for them as outputs."""
    return bool(_STATES_NAME.search(name)) and not name.startswith(("output_", "return_", "use_"))


def _parts(config: Any) -> Iterator[Any]:
    for value in vars(config).values() if config is not None else ():
        if hasattr(value, "model_type"):
            yield value
            yield from _parts(value)


def _special_tokens(config: Any) -> Iterator[int]:
    for owner in (config, *_parts(config)):
        for key, value in vars(owner).items() if owner is not None else ():
            if "token" in key and isinstance(value, int):
                yield value
            elif "token" in key and isinstance(value, list | tuple):
                yield from (one for one in value if isinstance(one, int))
