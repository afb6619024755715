"""Which linear modules of a model an adapter's config selects, by the rules of PEFT."""

from __future__ import annotations

import re
from pathlib import Path

from schemas.errors import BadInput
from worker.adapters.peft_config import CONFIG_FILE, PeftConfig
from worker.model.config import LINEAR_MODULES, ModelConfig
from worker.model.weights import PARENTS, group_of

#: A layer, and one of its linear modules.
Place = tuple[int, str]

#: Where ``layers_pattern`` is not given, the layer is the first number between dots.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."

#: What PEFT can change besides the linear modules of the layers.
_OTHER_MODULES = {"model.embed_tokens": "the token embeddings", "lm_head": "the output head"}


def module_name(place: Place) -> str:
    """What transformers and PEFT call it, ``model.layers.0.self_attn.q_proj``."""
    layer, module = place
    return f"model.layers.{layer}.{PARENTS[group_of(module)]}.{module}"


def selected_places(folder: Path, config: PeftConfig, model: ModelConfig) -> list[Place]:
    """The modules that the adapter changes, at least one.

    Raises BadInput if there is none, or one that cannot be changed here.
    """
    path = folder / CONFIG_FILE
    for name, what in _OTHER_MODULES.items():
        if _selects(config, name):
            raise BadInput(
                f"{path}: target_modules selects {name}: LoRA of {what} is not supported."
            )
    places = [(layer, module) for layer in range(model.num_layers) for module in LINEAR_MODULES]
    selected = [place for place in places if _selects(config, module_name(place))]
    if not selected:
        raise BadInput(
            f"{path}: targets nothing the model has. Look at target_modules, exclude_modules and"
            f" layers_to_transform; the model has {model.num_layers} layers with"
            f" {', '.join(LINEAR_MODULES)}."
        )
    return selected


def _selects(config: PeftConfig, name: str) -> bool:
    """As PEFT 0.21's ``check_target_module_exists`` and ``_maybe_include_all_linear_layers``."""
    targets, excluded = config.target_modules or [], config.exclude_modules or []
    if isinstance(excluded, str):
        if re.fullmatch(excluded, name):
            return False
    elif _is_named(name, excluded):
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return name not in _OTHER_MODULES
        return re.fullmatch(targets, name) is not None
    # A whole name is selected whatever layers_to_transform says.
    return name in targets or (_is_named(name, targets) and _is_in_layers(config, name))


def _is_named(name: str, names: list[str]) -> bool:
    """Whether one of the names is the module's whole name or the end of it."""
    return any(name == end or name.endswith(f".{end}") for end in names)


def _is_in_layers(config: PeftConfig, name: str) -> bool:
    """Whether ``layers_to_transform`` leaves the module in."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    matches = (re.match(pattern, name) for pattern in config.layer_patterns or [_ANY_LAYER])
    match = next(filter(None, matches), None)
    # A pattern with `|` may match without its layer.
    if match is None or match["idx"] is None:
        return False
    return int(match["idx"]) in ([layers] if isinstance(layers, int) else layers)
