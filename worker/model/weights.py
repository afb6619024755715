"""A decoder's weights: read from safetensors files, or made up for speed tests."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog
import torch
from safetensors import SafetensorError, safe_open

from schemas.errors import BadInput
from worker.model.config import ModelConfig, group_of

log = structlog.get_logger()

#: No linear group has spare rows.
NO_ROWS: Mapping[str, int] = MappingProxyType({})

_READABLE_TYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LayerWeights:
    """One layer.

    norms: by what is normalized, the keys of ``Family.norms``; all that is to be added is in them
    linears: of each group [out_features of all parts + spare, in_features]; what stands in the
        spare rows is for the adapters' slots to say
    biases: of each group that has some [out_features of all parts + spare], 0 where there is none
    """

    norms: dict[str, torch.Tensor]
    linears: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]


@dataclass(frozen=True)
class DecoderWeights:
    """All weights; ``head`` is ``embedding`` itself where the model ties them."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def weight_of(self, layer: int | None, module: str, config: ModelConfig) -> torch.Tensor:
        """One of the model's ``target_modules`` [out_features, in_features]."""
        if layer is None:
            return self.embedding.t() if module == "embed_tokens" else self.head
        group = group_of(module)
        return _part(self.layers[layer].linears[group], module, config)

    def ends(self) -> dict[str, torch.Tensor]:
        """The weights of ``END_MODULES``, each [vocab_size, hidden_size]."""
        return {"embed_tokens": self.embedding, "lm_head": self.head}


def _part(of_group: torch.Tensor, module: str, config: ModelConfig) -> torch.Tensor:
    """The rows of one module in what its linear group has of each output feature."""
    parts = config.parts_of(group_of(module))
    sizes = [config.linear_shape(part)[0] for part in parts]
    start = sum(sizes[: parts.index(module)])
    return of_group[start : start + config.linear_shape(module)[0]]


def _allocate(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, spare_rows: Mapping[str, int]
) -> DecoderWeights:
    """Memory for all weights, with zeros in spare rows and where a module has no bias."""
    norm_dtype = torch.float32 if config.family.norms_in_float32 else dtype
    biased_groups = {group_of(module) for module in config.biased_modules}

    def linear(group: str) -> torch.Tensor:
        out_features = config.out_features(group)
        in_features = config.linear_shape(config.parts_of(group)[0])[1]
        num_rows = out_features + spare_rows.get(group, 0)
        weight = torch.empty(num_rows, in_features, device=device, dtype=dtype)
        weight[out_features:].zero_()
        return weight

    def bias(group: str) -> torch.Tensor:
        num_rows = config.out_features(group) + spare_rows.get(group, 0)
        return torch.zeros(num_rows, device=device, dtype=dtype)

    def norm(size: int) -> torch.Tensor:
        return torch.empty(size, device=device, dtype=norm_dtype)

    def end() -> torch.Tensor:
        return torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)

    layers = [
        LayerWeights(
            {name: norm(config.norm_size(name)) for name in config.family.norms},
            {group: linear(group) for group in config.linear_groups},
            {group: bias(group) for group in config.linear_groups if group in biased_groups},
        )
        for _ in config.layers
    ]
    embedding = end()
    head = embedding if config.tie_word_embeddings else end()
    return DecoderWeights(embedding, layers, norm(config.hidden_size), head)


def tensors_by_name(weights: DecoderWeights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The memory of each tensor of the model, by its name in transformers; one that is tied to
    another has none."""
    decoder = config.family.decoder
    named = {f"{decoder}.norm.weight": weights.norm}
    for module, weight in weights.ends().items():
        if module == "embed_tokens" or not config.tie_word_embeddings:
            named[f"{config.family.module_name(None, module)}.weight"] = weight
    for index, layer in enumerate(weights.layers):
        for norm, name in config.family.norms.items():
            named[f"{decoder}.layers.{index}.{name}.weight"] = layer.norms[norm]
        for module in config.linear_modules:
            group, name = group_of(module), config.family.module_name(index, module)
            named[f"{name}.weight"] = _part(layer.linears[group], module, config)
            if module in config.biased_modules:
                named[f"{name}.bias"] = _part(layer.biases[group], module, config)
    return named


def _norms(weights: DecoderWeights) -> list[torch.Tensor]:
    return [weights.norm, *(norm for layer in weights.layers for norm in layer.norms.values())]


def load_weights(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    spare_rows: Mapping[str, int] = NO_ROWS,
) -> DecoderWeights:
    """Read a model folder's safetensors, one file or sharded; of files one is open at a time.

    ``spare_rows``: for each linear group, rows to leave behind its weight; none where it is not
    named.

    Raises BadInput, with the tensor's or file's name, for whatever is missing or of another shape.
    """
    stored = {config.family.current_name(name): (file, name) for name, file in _files(folder)}
    weights = _allocate(config, device, dtype, spare_rows)
    targets = tensors_by_name(weights, config)
    if missing := [name for name in targets if name not in stored]:
        raise BadInput(f"--model-path {folder}: the weights lack {missing[0]}.")
    by_file: dict[str, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for current_name, target in targets.items():
        file, name = stored[current_name]
        by_file[file].append((name, target))
    for number, (file, tensors) in enumerate(sorted(by_file.items()), 1):
        with _open(folder / file) as shard:
            for name, target in tensors:
                _copy(folder / file, shard, name, target)
        log.info("weights_read", file=file, files=f"{number} of {len(by_file)}")
    for norm in _norms(weights):
        norm.add_(config.family.norm_offset)
    return weights


def random_weights(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    spare_rows: Mapping[str, int] = NO_ROWS,
) -> DecoderWeights:
    """Weights of the right shapes and ordinary sizes, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    weights = _allocate(config, device, dtype, spare_rows)
    for tensor in tensors_by_name(weights, config).values():
        tensor.normal_(std=0.02, generator=generator)
    for norm in _norms(weights):
        norm.fill_(1)
    return weights


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file, of a sharded model."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--model-path {index}: is no index of safetensors files.") from error


def _files(folder: Path) -> Iterable[tuple[str, str]]:
    """Tensor names, each with its file, of a model in one file or several; as with transformers,
    one file goes before several."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        with _open(single) as file:
            return [(name, single.name) for name in file.keys()]  # noqa: SIM118 - it is no mapping
    if not index.exists():
        raise BadInput(
            f"--model-path {folder}: holds neither {single.name} nor {index.name}. Other formats"
            " are not read; `--load-format dummy` runs on random weights."
        )
    return _weight_map(index).items()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"--model-path {path}: {error}") from error


def _copy(path: Path, file: Any, name: str, target: torch.Tensor) -> None:
    try:
        header = file.get_slice(name)
    except SafetensorError as error:
        raise BadInput(f"--model-path {path}: {name}: {error}") from error
    if (shape := tuple(header.get_shape())) != tuple(target.shape):
        raise BadInput(
            f"--model-path {path}: {name} has the shape {shape};"
            f" config.json asks for {tuple(target.shape)}."
        )
    if (kind := header.get_dtype()) not in _READABLE_TYPES:
        raise BadInput(
            f"--model-path {path}: {name} has the type {kind}; {', '.join(_READABLE_TYPES)} can be"
            " read."
        )
    target.copy_(file.get_tensor(name))
