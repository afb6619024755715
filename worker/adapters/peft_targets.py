"""Which modules of a model an adapter's config selects, by the rules of PEFT."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import BadInput
from worker.adapters.peft_config import CONFIG_FILE, PeftConfig
from worker.model.config import END_MODULES, ModelConfig

#: A layer and one of its linear modules, or no layer and one of ``END_MODULES``.
Place = tuple[int | None, str]


def all_places(model: ModelConfig) -> list[Place]:
    """Every module that an adapter can change."""
    layers = [
        (layer, module) for layer in range(model.num_layers) for module in model.linear_modules
    ]
    return [*layers, *((None, module) for module in END_MODULES)]


def module_names(model: ModelConfig) -> list[str]:
    """What transformers calls each of them."""
    return [model.family.module_name(*place) for place in all_places(model)]


@dataclass(frozen=True)
class Selection:
    """What an adapter's config says that it changes."""

    places: list[Place]
    """Modules with LoRA, at least one."""
    trained: list[str]
    """Those of ``END_MODULES`` that it replaces."""
    is_tied: bool
    """Whether the changes of both ends are one, as the base model's weights of both are."""


def select(folder: Path, config: PeftConfig, model: ModelConfig) -> Selection:
    """Raises BadInput, naming the setting, if nothing is selected, or what cannot be changed."""
    path = folder / CONFIG_FILE
    targets, excluded = _names(config.target_modules), _names(config.exclude_modules)
    places = [
        place for place in all_places(model) if _selects(config, targets, excluded, place, model)
    ]
    trained = _trained(path, config, model)
    is_tied = model.tie_word_embeddings and config.ensure_weight_tying
    if is_tied and trained:
        trained = [*END_MODULES]
    elif is_tied and any(layer is None for layer, _ in places):
        places = [place for place in places if place[0] is not None]
        places += [(None, module) for module in END_MODULES]
    if not places:
        raise BadInput(
            f"{path}: targets nothing the model has. {_about_former_names(config, model)}Look at"
            f" target_modules, exclude_modules and layers_to_transform; the model has"
            f" {model.num_layers} layers with {', '.join(model.target_modules)}."
        )
    for module in trained:
        if (None, module) in places:
            raise BadInput(
                f"{path}: both target_modules and modules_to_save select {module}; a module is"
                " either replaced or changed by LoRA."
            )
    return Selection(places, trained, is_tied)


def _about_former_names(config: PeftConfig, model: ModelConfig) -> str:
    """Which names of former versions are targets; PEFT 0.21 knows them in tensors only."""
    family, targets = model.family, config.target_modules or []
    names = [targets] if isinstance(targets, str) else targets
    for former, current in family.former_names.items():
        is_of_text = not current.startswith(family.beside_text)
        # A regular expression's dots may be escaped.
        if is_of_text and any(former in name.replace("\\", "") + "." for name in names):
            return (
                f"target_modules says {former.rstrip('.')}, which transformers calls"
                f" {current.rstrip('.')} today; PEFT reads the former name in tensors only, so"
                " write today's. "
            )
    return ""


def _trained(path: Path, config: PeftConfig, model: ModelConfig) -> list[str]:
    """The modules that ``modules_to_save`` names, by their whole names or the ends of them."""
    names = config.modules_to_save or []
    ends = {module: model.family.module_name(None, module) for module in END_MODULES}
    for name in names:
        if not any(_is_named(whole, [name]) for whole in ends.values()):
            raise BadInput(
                f"{path}: modules_to_save: '{name}': of fully trained modules only"
                f" {' and '.join(END_MODULES)} can be served."
            )
    return [module for module, whole in ends.items() if _is_named(whole, names)]


#: Of one setting: a regular expression, or names or ends of names.
Names = str | frozenset[str]


def _names(given: list[str] | str | None) -> Names:
    # Of lists of 100,000 names each comparison with all modules of a model would take seconds.
    return given if isinstance(given, str) else frozenset(given or ())


def _selects(
    config: PeftConfig, targets: Names, excluded: Names, place: Place, model: ModelConfig
) -> bool:
    """As PEFT 0.21's ``check_target_module_exists`` and ``_maybe_include_all_linear_layers``."""
    layer, module = place
    name = model.family.module_name(layer, module)
    if isinstance(excluded, str):
        if config.matches("exclude_modules", name):
            return False
    elif _is_named(name, excluded):
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return layer is not None
        return config.matches("target_modules", name)
    # A whole name is selected whatever layers_to_transform says.
    return name in targets or (_is_named(name, targets) and config.is_in_layers(name))


def _is_named(name: str, names: Collection[str]) -> bool:
    """Whether one of the names is the module's whole name or the end of it."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))
