"""Inputs for a toy model, from its forward's signature and its configuration."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_qk.verification.inputs import BATCH, TOKENS, InputMaker, is_states
from tools.coverage.catalogue import INPUTS

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


class _Maker(InputMaker):
    """Makes more kinds of inputs: grids of patches, time series, hidden states, inputs of parts."""

    def tensor(self, kind: str, *shape: int) -> Any:
        """An argument of an override, whose kinds :data:`~tools.coverage.catalogue.INPUTS` tells."""
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
        first = self._main_kind(main, kinds)
        return (
            sorted(kinds, key=lambda kind: kind != first and kind != "grid")
            if "grid" in kinds[:1]
            else sorted(kinds, key=lambda kind: kind != first)
        )

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
            if is_states(name)
        }
        if "spatial_shapes" in self.parameters:
            yield self._required({**states, "spatial_shapes": torch.tensor([[3, 4]])})
        yield self._required(states)
        yield self._required({})
