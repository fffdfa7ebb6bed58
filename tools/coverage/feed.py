"""Inputs for a toy model, from its forward's signature and its configuration."""

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tools.coverage.overrides import INPUTS

BATCH, TOKENS = 2, 12
_GRIDS = ("grid_thw", "image_grid_thw", "grid_hw", "image_grid_hw", "grid_hws")
_STATES = (
    "inputs_embeds", "hidden_states", "hidden_state", "query_embeds", "inputs", "x", "input_embeds", "embeddings",
    "sequence",
    "image_hidden_states", "image_embeds", "text_embeds", "latents", "image_features", "features",
)  # fmt: skip


def feeds(model: nn.Module, model_type: str | None = None, config: Any = None) -> Iterator[dict[str, Any]]:
    """Arguments for a model's forward, the likeliest first; the caller takes the first that run.

    Args:
        model: a model of transformers or a part of one, with a ``config``.
        model_type: whose overrides to apply; None takes the type that the model's own configuration says.
        config: of the model; None takes its own.
    """
    maker = _Maker(model, config)
    model_type = model_type or getattr(getattr(model, "config", None), "model_type", None)
    if model_type in INPUTS:
        yield {name: maker.tensor(*value) for name, value in INPUTS[model_type].items()}
    yield from maker.candidates()


class _Maker:
    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model = model
        self.config = getattr(model, "config", None) if config is None else config
        self.parameters = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(1)

    # Values

    def tensor(self, kind: str, *shape: int) -> Any:
        """An argument of an override, whose kinds :data:`~tools.coverage.overrides.INPUTS` tells."""
        if kind == "float":
            return self.floats(*shape)
        if kind == "int":
            return self.ints(shape[0], *shape[1:])
        if kind == "bool":
            return torch.ones(shape, dtype=torch.bool)
        if kind == "value":
            return torch.tensor(shape)
        if kind == "number":
            return shape[0]
        return getattr(torch, kind)(shape, dtype=torch.long)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ints(self, high: int, *shape: int) -> Tensor:
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

    def words(self, tokens: int = TOKENS, name: str = "vocab_size") -> Tensor:
        high = self.field(name, "vocab_size", default=100)
        special = set(_special_tokens(self.config))
        allowed = torch.tensor(
            [token for token in range(min(high, 90)) if token not in special and token > 3] or [0]
        )
        return allowed[self.ints(len(allowed), BATCH, tokens)]

    def sides(self) -> list[tuple[int, int]]:
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
        return self.field("num_channels", "in_channels", "in_chans", "input_channels", default=3)

    def width(self, *names: str) -> int:
        return self.field(*names, "hidden_size", "d_model", "embed_dim", default=64)

    # Candidates

    def candidates(self) -> Iterator[dict[str, Any]]:
        main = getattr(self.model, "main_input_name", None)
        main = main if isinstance(main, str) else None
        for kind in self._kinds(main):
            yield from getattr(self, f"_feed_{kind}")()

    def _kinds(self, main: str | None) -> list[str]:
        names = set(self.parameters)
        kinds = []
        if names & set(_GRIDS) and "input_ids" not in names:
            kinds.append("grid")
        if "pixel_values" in names and "input_ids" in names and "bbox" not in names:
            kinds.append("image_text")
        if "input_ids" in names:
            kinds.append("text")
        if names & {"pixel_values", "pixel_values_videos", "video_pixels", "images"}:
            kinds.append("image")
        if names & {"input_features", "input_values", "audio_values", "spectrogram"}:
            kinds.append("audio")
        if names & {"past_values", "timeseries"}:
            kinds.append("series")
        if names & set(_STATES):
            kinds.append("states")
        if "patch_values" in names or "flattened_patches" in names or "pixel_values" in names:
            kinds.append("patches")
        if names & set(_GRIDS) and "grid" not in kinds:
            kinds.append("grid")
        if {"pixel_values", "target_sizes"} <= names:
            kinds.append("strip")
        if {"input_features", "feature_lens"} <= names:
            kinds.append("frames")
        kinds.append("named")
        order = {
            "pixel_values": "image",
            "input_features": "audio",
            "input_values": "audio",
            "input_ids": "text",
        }
        first = order.get(main or "", "")
        if first == "text" and "image_text" in kinds:
            first = "image_text"
        return (
            sorted(kinds, key=lambda kind: kind != first and kind != "grid")
            if "grid" in kinds[:1]
            else sorted(kinds, key=lambda kind: kind != first)
        )

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
        n = TOKENS
        kind = self.parameters[name].annotation if name in self.parameters else None
        if "attention_mask" in name or name in ("mask", "padding_mask"):
            return torch.ones(BATCH, n, dtype=torch.long)
        if name in ("position_ids", "positions"):
            return torch.arange(n).expand(BATCH, n)
        if name == "bbox":
            return torch.tensor([1, 2, 10, 20]).expand(BATCH, n, 4).contiguous()
        if "list[" in str(kind) and _is_states(name):
            # Maps of several scales, the finest first; the coarsest has as many places as there are tokens.
            width = self.width()
            return [self.floats(BATCH, width, 3 * scale, 4 * scale) for scale in (4, 2, 1)]
        if "encoder_hidden_states" in name:
            return self._encoder_states()["encoder_hidden_states"]
        if name.endswith("input_ids"):
            return self.words(7)
        if name == "merge_sizes":
            return torch.ones(2, dtype=torch.long)
        if _is_states(name) or "embeds" in name or "states" in name:
            return self._hidden()
        return None

    def _hidden(self) -> Tensor:
        return self.floats(BATCH, TOKENS, self.width())

    def _feed_text(self) -> Iterator[dict[str, Any]]:
        ids = {"input_ids": self.words()}
        if "bbox" in self.parameters:
            ids["bbox"] = self._extra("bbox")
        decoder = self._decoder()
        text = {**ids, **decoder}
        if "attention_mask" in self.parameters:
            # The end of the last sequence is padding, so that masks count.
            mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
            mask[-1, -3:] = 0
            yield self._required({**text, "attention_mask": mask})
        yield self._required(text)
        if "attention_mask" in self.parameters:
            yield self._required({**text, "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)})
        for tokens in (16, 32, 64, 128):
            yield self._required({**text, "input_ids": self.words(tokens)})
        yield self._required({"input_ids": self.ints(2, BATCH, TOKENS) + 1, **decoder})
        codebooks = self.field(
            "num_codebooks", "n_codebooks", "num_code_groups", "num_channels", "channels", default=2
        )
        several = {**text, "input_ids": self.words(TOKENS * codebooks).reshape(BATCH, TOKENS, codebooks)}
        yield self._required(several)
        if "encoder_hidden_states" in self.parameters:
            yield self._required({**several, **self._encoder_states()})
        yield self._required(
            {**text, "input_ids": self.words(TOKENS * codebooks).reshape(BATCH * codebooks, TOKENS)}
        )
        yield self._required(
            {**text, "input_ids": self.words(TOKENS * codebooks).reshape(BATCH, codebooks, TOKENS)}
        )
        if "inputs_embeds" in self.parameters:
            yield self._required({"inputs_embeds": self.floats(BATCH, TOKENS, self.width()), **decoder})

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
            token = self._token_id("image_token_id", "image_token_index")
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

    def _token_id(self, *names: str) -> int | None:
        for name in names:
            value = getattr(self.config, name, None)
            if isinstance(value, int):
                return value
        return None

    def _feed_audio(self) -> Iterator[dict[str, Any]]:
        mel = self.field("num_mel_bins", "n_mels", "input_feat_size", "feature_size", "input_feat_per_channel",
                         "n_mel_bins", "input_dim", "num_mel_bins", "mel_dim", default=80)  # fmt: skip
        mels = list(dict.fromkeys([mel, *self._linear_widths(), *self._conv_widths()]))
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

    def _feed_series(self) -> Iterator[dict[str, Any]]:
        context = self.field("context_length", default=32)
        horizon = self.field("prediction_length", "horizon_length", default=8)
        channels = self.field("num_input_channels", "input_size", default=1)
        lags = self.field("lags_sequence", default=[0], kind=(list, tuple))
        past = context + max(lags)
        for shape in ((BATCH, past, channels), (BATCH, past), (BATCH, context, channels), (BATCH, context)):
            given: dict[str, Any] = {"past_values": self.floats(*shape)}
            if "past_time_features" in self.parameters:
                times = self.field("num_time_features", default=1)
                given |= {
                    "past_time_features": self.floats(BATCH, shape[1], times),
                    "past_observed_mask": torch.ones(shape),
                    "future_values": self.floats(BATCH, horizon, *shape[2:]),
                    "future_time_features": self.floats(BATCH, horizon, times),
                }
            yield self._required(given)
            if "past_values_padding" in self.parameters:
                yield {
                    **given,
                    "past_values_padding": torch.zeros(shape),
                    "freq": torch.zeros(BATCH, 1).long(),
                }
            yield {**given, "past_observed_mask": torch.ones(shape)}

    def _feed_states(self) -> Iterator[dict[str, Any]]:
        name = next(one for one in _STATES if one in self.parameters)
        widths = dict.fromkeys(
            [
                self.width(),
                *(
                    self.field(one)
                    for one in (
                        "hidden_size",
                        "d_model",
                        "embed_dim",
                        "encoder_hidden_size",
                        "d_latents",
                        "input_dim",
                        "vision_hidden_size",
                        "mm_hidden_size",
                        "feature_size",
                        "input_size",
                        "num_features",
                    )
                ),
                *self._linear_widths(),
            ]
        )
        for width in widths:
            if not isinstance(width, int):
                continue
            for shape in ((BATCH, TOKENS, width), (BATCH, 16, width), (BATCH, width, 8, 8), (TOKENS, width)):
                yield self._required({name: self.floats(*shape), **self._decoder(), **self._encoder_states()})

    def _encoder_states(self) -> dict[str, Any]:
        if "encoder_hidden_states" not in self.parameters:
            return {}
        names = ("encoder_hidden_size", "cross_attention_hidden_size", "cross_hidden_size")
        return {"encoder_hidden_states": self.floats(BATCH, 5, self.width(*names))}

    def _conv_widths(self) -> list[int]:
        return [module.in_channels for module in self.model.modules() if isinstance(module, nn.Conv1d)][:1]

    def _linear_widths(self) -> list[int]:
        return [module.in_features for module in self.model.modules() if isinstance(module, nn.Linear)][:2]

    def _feed_patches(self) -> Iterator[dict[str, Any]]:
        patch = self.field("patch_size", default=16)
        patch = patch if isinstance(patch, int) else 16
        flat = patch * patch * self.channels()
        patches = self.floats(BATCH, 16, flat)
        if "flattened_patches" in self.parameters:
            index = (
                torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(
                    16, 2
                )
                + 1
            )
            numbered = torch.cat([index.expand(BATCH, 16, 2).float(), self.floats(BATCH, 16, flat)], -1)
            yield self._required({"flattened_patches": numbered, **self._decoder()})
        if "pixel_values" in self.parameters:
            mask = torch.ones(BATCH, 16, dtype=torch.long)
            shapes = torch.tensor([[4, 4]] * BATCH)
            position = torch.stack(
                torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1
            ).reshape(1, 16, 2)
            extras = {
                "pixel_attention_mask": mask,
                "spatial_shapes": shapes,
                "attention_mask": mask,
                "pixel_position_ids": position.expand(BATCH, 16, 2),
                "image_position_ids": position.expand(BATCH, 16, 2),
            }
            given = {name: value for name, value in extras.items() if name in self.parameters}
            yield self._required({"pixel_values": patches, **given})
            if "input_ids" in self.parameters:
                yield self._required({"pixel_values": patches, "input_ids": self.words(), **given})

    def _feed_grid(self) -> Iterator[dict[str, Any]]:
        patch = self.field("patch_size", default=14)
        patch = patch if isinstance(patch, int) else patch[-1]
        frames = self.field("temporal_patch_size", default=2, kind=(int, list, tuple))
        frames = frames if isinstance(frames, int) else frames[0]
        grid = torch.tensor([[1, 4, 4], [1, 8, 4]])
        name = "hidden_states" if "hidden_states" in self.parameters else "pixel_values"
        if name not in self.parameters:
            return
        for depth in dict.fromkeys((frames, 1)):
            flat = patch * patch * depth * self.channels()
            values = self.floats(48, flat)
            for grid_name in _GRIDS:
                if grid_name not in self.parameters:
                    continue
                yield self._required({name: values, grid_name: grid})
                yield self._required({name: values, grid_name: grid[:, 1:]})
                yield self._required({name: values.reshape(48, self.channels(), -1, patch, patch).squeeze(2),
                                      grid_name: grid})  # fmt: skip
                yield self._required({name: values[None], grid_name: grid})
                yield self._required({name: self.floats(48, self.width()), grid_name: grid})
                yield self._required(
                    {name: self.floats(1, 48, self.channels(), patch, patch), grid_name: grid}
                )
                side = patch * self.field("spatial_merge_size", default=1)
                yield self._required({name: self.floats(48, side, side, self.channels()), grid_name: grid})

    def _feed_strip(self) -> Iterator[dict[str, Any]]:
        """Patches of several images side by side, as one image of one row of patches."""
        patch = self.field("patch_size", default=14)
        sizes = torch.tensor([[4, 4], [4, 8]])
        strip = self.floats(1, self.channels(), patch, patch * int(sizes.prod(-1).sum()))
        yield self._required({"pixel_values": strip, "target_sizes": sizes})

    def _feed_frames(self) -> Iterator[dict[str, Any]]:
        """Frames of several sounds one after another, and how many each has."""
        mel = self.field("num_mel_bins", "feature_size", default=80)
        chunk = 2 * self.field("n_window", default=32)
        lengths = torch.tensor([chunk + chunk // 2, chunk // 2])
        given = {"input_features": self.floats(mel, int(lengths.sum())), "feature_lens": lengths}
        if "aftercnn_lens" in self.parameters:
            given["aftercnn_lens"] = (lengths - 1) // 2 + 1
        yield self._required(given)

    def _feed_named(self) -> Iterator[dict[str, Any]]:
        """What parts take from other parts, known by the names of their arguments alone."""
        states = {
            # As many as places: what one part encoded for another is the same sequence here.
            name: self._extra(name) if "list[" in str(parameter.annotation) else self._hidden()
            for name, parameter in self.parameters.items()
            if _is_states(name)
        }
        if "spatial_shapes" in self.parameters:
            yield self._required({**states, "spatial_shapes": torch.tensor([[3, 4]])})
        yield self._required(states)
        yield self._required({})


_STATES_NAME = re.compile(
    r"(embeds|states?|features|queries|context|latents|pos_encoding|position_encoding)$", re.IGNORECASE
)


def _is_states(name: str) -> bool:
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
