"""``adapter_config.json``: the settings that decide the product, and those that are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from schemas.errors import BadInput
from schemas.faults import first_fault
from schemas.hub import HubSource
from worker.adapters.files import open_file
from worker.adapters.module_patterns import Matches, PatternSetting, match_names
from worker.reasons import shown

Number = TypeVar("Number", int, float)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

#: Of a config: a rank and an alpha for each linear module of 126 layers take 130 KB. While a file
#: is parsed no other thread runs.
_MAX_CONFIG_BYTES = 1_000_000

#: How PEFT 0.21 reads a key of ``rank_pattern`` and ``alpha_pattern`` (``get_pattern_key``), and an
#: entry of ``layers_pattern`` (``check_target_module_exists``).
_MODULE_PATTERN = r"(.*\.)?({})$"
_LAYER_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."

#: Where ``layers_pattern`` is not given, the layer is the first number between dots.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."

#: Ways to begin training (in lower case, as PEFT compares them) that leave the base model's weights
#: as they are. The others change them, and an adapter over the unchanged base would answer wrongly.
_INNOCENT_INIT = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")

#: Of the others, those whose adapters PEFT can turn into such for the unchanged base.
_CONVERTIBLE_INIT = re.compile("pissa.*|olora|corda|lora_ga")

#: Settings that change the product ``B A`` and are not served.
_REFUSED_SETTINGS = {
    "layer_replication": "replicated layers",
    "lora_bias": "a bias in B",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "bare parameters as targets",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "LoRA of Megatron's layers",
}

#: Settings that matter to training or to other tools and not to the result. ``fan_in_fan_out`` is
#: of layers that store their weight transposed; PEFT turns it off for those of a Llama.
_IGNORED_SETTINGS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


# No more than torch can count: floats, of which the scaling is one, hold any of these.
_Rank = Annotated[int, Field(ge=1, lt=1 << 63)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]

# No more than the first fault is told, and to collect those of 300,000 items takes seconds.
_Names = Annotated[list[str], Field(fail_fast=True)]
_Layers = Annotated[list[int], Field(fail_fast=True)]


class PeftConfig(BaseModel):
    """The part of ``adapter_config.json`` that decides the product.

    A module is given by its whole name in the model, ``model.layers.0.self_attn.q_proj``.
    """

    # Strict, as PEFT would not take "8" for 8 either.
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    peft_type: str
    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    target_modules: _Names | str | None = None
    exclude_modules: _Names | str | None = None
    layers_to_transform: _Layers | int | None = None
    layers_pattern: _Names | str | None = None
    # PEFT trains and saves biases of the base model, and Llama has none.
    bias: Literal["none", "all", "lora_only"] = "none"
    ensure_weight_tying: bool = False
    modules_to_save: _Names | None = None

    _matches: Matches = PrivateAttr(default_factory=dict)
    """Of regular expressions, with the names of the model's modules."""

    @property
    def base_repository(self) -> str | None:
        """What the adapter was trained on, if that is named as a repository of the hub is."""
        name = (self.model_extra or {}).get("base_model_name_or_path")
        source = HubSource.parse(name) if isinstance(name, str) else None
        return source.repo if source else None

    def matches(self, setting: str, module: str) -> bool:
        """Whether the regular expression of ``target_modules`` or ``exclude_modules`` does."""
        return module in self._matches[setting]

    def is_in_layers(self, module: str) -> bool:
        """Whether ``layers_to_transform`` leaves the module in."""
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        match = self._matches["layers_pattern"].get(module)
        # A pattern with `|` may match without its layer.
        if match is None or match.layer is None:
            return False
        return int(match.layer) in ([layers] if isinstance(layers, int) else layers)

    def rank_of(self, module: str) -> int:
        return self._by_pattern("rank_pattern", self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilized LoRA (Kalajdzievski, 2023)."""
        rank = self.rank_of(module)
        alpha = self._by_pattern("alpha_pattern", self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _by_pattern(
        self, setting: str, values: Mapping[str, Number] | None, module: str, otherwise: Number
    ) -> Number:
        """The value of the first pattern that matches, in the order of the file."""
        match = self._matches[setting].get(module)
        return values[match.pattern] if values and match else otherwise


def read_config(folder: Path, modules: Sequence[str]) -> PeftConfig:
    """``modules`` are the names of those that the model has, of which the config may tell.

    Raises BadInput, naming the setting, for a config that cannot be served exactly.
    """
    path = folder / CONFIG_FILE
    settings = read_settings(folder)
    if (peft_type := settings.get("peft_type", "missing")) != "LORA":
        raise BadInput(f"{path}: peft_type is {shown(peft_type)}; only LORA can be served.")
    try:
        config = PeftConfig.model_validate(settings)
    except ValidationError as error:
        raise BadInput(f"{path}: {first_fault(error)}") from error
    _check_settings(path, config.model_extra or {})
    _check_targets(path, config)
    config._matches = match_names(path, [*_patterns(config)], modules)
    return config


def read_settings(folder: Path) -> dict[str, Any]:
    """What the file holds, which can be written as JSON again; raises BadInput if that is no JSON
    object."""
    path = folder / CONFIG_FILE
    try:
        with open_file(path) as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise BadInput(
                f"{path}: has more than {_MAX_CONFIG_BYTES} bytes, which no config needs."
            )
        settings = json.loads(content)
        if not isinstance(settings, dict):
            raise ValueError("it holds something else")
        # Python reads halves of characters (surrogates) as text, which nobody can write.
        json.dumps(settings, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise BadInput(f"{folder} is no PEFT adapter: it lacks {CONFIG_FILE}.") from error
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{path}: holds {error.object[error.start]!a}, half of a character, in a text."
        ) from error
    except RecursionError as error:
        raise BadInput(f"{path}: is nested too deeply to be a config.") from error
    except ValueError as error:
        raise BadInput(f"{path}: is no JSON object: {error}") from error
    return settings


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    for setting, value in settings.items():
        if setting in _REFUSED_SETTINGS and value:
            raise BadInput(f"{path}: {setting}: {_REFUSED_SETTINGS[setting]} is not supported.")
        if value and setting not in _REFUSED_SETTINGS and setting not in _IGNORED_SETTINGS:
            raise BadInput(
                f"{path}: the setting '{shown(setting)}' is unknown here, so the adapter may not be"
                " served as it was trained. Remove the setting if it does not matter."
            )
    _check_init(path, settings.get("init_lora_weights", True))


def _check_init(path: Path, init: object) -> None:
    kind = str(init).lower()
    if kind in _INNOCENT_INIT:
        return
    place = f"{path}: init_lora_weights is '{shown(init)}'"
    if _CONVERTIBLE_INIT.fullmatch(kind):
        raise BadInput(
            f"{place}, which changes the base model's weights."
            " Convert the adapter with PEFT (path_initial_model_for_weight_conversion) first."
        )
    if kind == "loftq":
        raise BadInput(
            f"{place}: the adapter makes up for the errors of a quantized base model, and this one"
            " is not quantized."
        )
    raise BadInput(
        f"{place}, which is unknown here and may have changed the base model's weights."
        " Write true if it has not."
    )


def _check_targets(path: Path, config: PeftConfig) -> None:
    """Refuse what PEFT refuses, or decides by a table of its own."""
    if config.target_modules is None:
        raise BadInput(
            f"{path}: target_modules is not given, and PEFT would choose by its version."
            " Name the modules that were trained."
        )
    for setting in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, setting) is not None:
            raise BadInput(f"{path}: {setting} does not go with target_modules in one string.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise BadInput(f"{path}: layers_pattern does not go without layers_to_transform.")


def _patterns(config: PeftConfig) -> Iterator[PatternSetting]:
    """Every regular expression that counts."""
    for setting, patterns in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        yield PatternSetting(setting, tuple(patterns or ()), _MODULE_PATTERN, whole=False)
    for setting, names in (
        ("target_modules", config.target_modules),
        ("exclude_modules", config.exclude_modules),
    ):
        if isinstance(names, str):
            yield PatternSetting(setting, (names,), "{}", whole=True)
    layers = config.layers_pattern or ()
    if given := (layers,) if isinstance(layers, str) else tuple(layers):
        yield PatternSetting("layers_pattern", given, _LAYER_PATTERN, whole=False)
    else:
        yield PatternSetting("layers_pattern", ("",), _ANY_LAYER, whole=False)
