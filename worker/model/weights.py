"""A decoder's weights: read from safetensors files, or made up for speed tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from schemas.errors import BadInput
from worker.model.config import LINEAR_GROUPS, ModelConfig

#: Where each fused linear stands in a Hugging Face state dict.
PARENTS = {
    "qkv_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_up_proj": "mlp",
    "down_proj": "mlp",
}


#: No linear group has spare rows.
NO_ROWS: Mapping[str, int] = MappingProxyType({})


def group_of(module: str) -> str:
    """The group of fused linear modules that one of them belongs to."""
    return next(group for group, parts in LINEAR_GROUPS.items() if module in parts)


@dataclass(frozen=True)
class LayerWeights:
    """One layer: norms [hidden_size], linears [out_features of all parts + spare, in_features].

    What stands in the spare rows is for the adapters' slots to say.
    """

    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    linears: dict[str, torch.Tensor]


@dataclass(frozen=True)
class DecoderWeights:
    """All weights; ``head`` is ``embedding`` itself where the model ties them."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def weight_of(self, layer: int | None, module: str, config: ModelConfig) -> torch.Tensor:
        """One of ``TARGET_MODULES`` [out_features, in_features]."""
        if layer is None:
            return self.embedding.t() if module == "embed_tokens" else self.head
        group = group_of(module)
        parts = LINEAR_GROUPS[group]
        sizes = [config.linear_shape(part)[0] for part in parts]
        start = sum(sizes[: parts.index(module)])
        return self.layers[layer].linears[group][start : start + config.linear_shape(module)[0]]

    def ends(self) -> dict[str, torch.Tensor]:
        """The weights of ``END_MODULES``, each [vocab_size, hidden_size]."""
        return {"embed_tokens": self.embedding, "lm_head": self.head}


def load_weights(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    spare_rows: Mapping[str, int] = NO_ROWS,
) -> DecoderWeights:
    """Read a model folder's safetensors, one file or sharded.

    ``spare_rows``: for each linear group, rows to leave behind its weight; none where it is not
    named.

    Raises BadInput, with the tensor's or file's name, for whatever is missing or of another shape.
    """
    reader = _TensorReader(folder, device, dtype)
    hidden = (config.hidden_size,)
    embedding_shape = (config.vocab_size, config.hidden_size)
    layers = []
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        linears = {
            group: _with_spare_rows(
                torch.cat(
                    [
                        reader.read(f"{prefix}{parent}.{part}.weight", config.linear_shape(part))
                        for part in LINEAR_GROUPS[group]
                    ]
                ),
                spare_rows.get(group, 0),
            )
            for group, parent in PARENTS.items()
        }
        layers.append(
            LayerWeights(
                reader.read(prefix + "input_layernorm.weight", hidden),
                reader.read(prefix + "post_attention_layernorm.weight", hidden),
                linears,
            )
        )
    embedding = reader.read("model.embed_tokens.weight", embedding_shape)
    norm = reader.read("model.norm.weight", hidden)
    if config.tie_word_embeddings:
        return DecoderWeights(embedding, layers, norm, embedding)
    return DecoderWeights(embedding, layers, norm, reader.read("lm_head.weight", embedding_shape))


def _with_spare_rows(weight: torch.Tensor, count: int) -> torch.Tensor:
    if not count:
        return weight
    spare = weight.new_zeros(count, weight.shape[1])
    return torch.cat([weight, spare])


def random_weights(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    spare_rows: Mapping[str, int] = NO_ROWS,
) -> DecoderWeights:
    """Weights of the right shapes and ordinary sizes, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        weight = torch.empty(shape, device=device, dtype=dtype)
        return weight.normal_(std=0.02, generator=generator)

    def ones() -> torch.Tensor:
        return torch.ones(config.hidden_size, device=device, dtype=dtype)

    def linear(group: str, parts: tuple[str, ...]) -> torch.Tensor:
        weight = normal(config.out_features(group), config.linear_shape(parts[0])[1])
        return _with_spare_rows(weight, spare_rows.get(group, 0))

    layers = [
        LayerWeights(
            ones(), ones(), {group: linear(group, p) for group, p in LINEAR_GROUPS.items()}
        )
        for _ in range(config.num_layers)
    ]
    embedding = normal(config.vocab_size, config.hidden_size)
    head = embedding if config.tie_word_embeddings else normal(*embedding.shape)
    return DecoderWeights(embedding, layers, ones(), head)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file, of a sharded model."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--model-path {index}: is no index of safetensors files.") from error


class _TensorReader:
    """Finds tensors by name in a folder's safetensors files."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._folder = folder
        self._device = device
        self._dtype = dtype
        self._files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.exists():
            weight_map = _weight_map(index)
        elif single.exists():
            weight_map = dict.fromkeys(self._open(single.name).keys(), single.name)
        else:
            raise BadInput(
                f"--model-path {folder}: holds neither model.safetensors nor"
                " model.safetensors.index.json. Other formats are not read;"
                " `--load-format dummy` runs on random weights."
            )
        self._weight_map: dict[str, str] = weight_map

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._weight_map:
            raise BadInput(f"--model-path {self._folder}: the weights lack {name}.")
        file = self._weight_map[name]
        try:
            tensor: torch.Tensor = self._open(file).get_tensor(name)
        except SafetensorError as error:
            raise BadInput(f"--model-path {self._folder / file}: {name}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise BadInput(
                f"--model-path {self._folder / file}: {name} has the shape {tuple(tensor.shape)};"
                f" config.json asks for {shape}."
            )
        return tensor.to(self._device, self._dtype)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self._folder / file, "pt")
            except (OSError, SafetensorError) as error:
                raise BadInput(f"--model-path {self._folder / file}: {error}") from error
        return self._files[file]
