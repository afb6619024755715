"""Which modules an adapter changes, at which rank and scaling: PEFT itself is asked."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.errors import BadInput
from tests.tiny_models import ALL_MODULES, make_llama
from worker.adapters.peft_config import read_config
from worker.adapters.peft_targets import Place, module_names, select
from worker.model.config import ModelConfig
from worker.model.families import FAMILIES

#: Enough that the number of a layer may begin with that of another.
NUM_LAYERS = 12

CONFIGS: dict[str, dict[str, object]] = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "a name that no module has": {"target_modules": ["v_proj", "query_key_value", "proj"]},
    "longer names": {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "the end of a name": {"target_modules": ["1.mlp.up_proj"]},
    "a whole name and a layer": {
        "target_modules": ["model.layers.3.mlp.up_proj", "v_proj"],
        "layers_to_transform": 7,
    },
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear but some": {"target_modules": "All-Linear", "exclude_modules": ["up_proj"]},
    "a regular expression": {"target_modules": r".*\.(q|v)_proj"},
    "one for some layers": {"target_modules": r"model\.layers\.(1|11)\.mlp\.[a-z]+_proj"},
    "one that finds a part only": {"target_modules": r".*layers\.2\..*k_proj|q_proj"},
    "some layers": {"target_modules": ["k_proj"], "layers_to_transform": [0, 11, 40]},
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": 1},
    "no layers given": {"target_modules": ["k_proj"], "layers_to_transform": []},
    "a layers pattern": {
        "target_modules": ["o_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "layers",
    },
    "layers patterns": {
        "target_modules": ["o_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["h", "blocks", "lay.*"],
    },
    "an empty layers pattern": {
        "target_modules": ["o_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "",
    },
    "excluded names": {
        "target_modules": list(ALL_MODULES),
        "exclude_modules": ["k_proj", "1.mlp.up_proj", "model.layers.2.mlp.up_proj"],
    },
    "an excluded pattern": {
        "target_modules": ["gate_proj", "q_proj"],
        "exclude_modules": r".*\.[0-4]\..*",
    },
    "an excluded pattern that finds a part only": {
        "target_modules": ["gate_proj"],
        "exclude_modules": r"layers\.3",
    },
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole names of ends": {"target_modules": ["model.embed_tokens", "model.lm_head"]},
    "ends by a pattern": {"target_modules": r"(.*\.)?(lm_head|embed_tokens|q_proj)"},
    "ends have no layer": {
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "layers_to_transform": [1],
    },
    "an excluded end": {
        "target_modules": ["embed_tokens", "lm_head"],
        "exclude_modules": ["embed_tokens"],
    },
    "ranks of ends": {
        "target_modules": ["embed_tokens", "lm_head"],
        "use_rslora": True,
        "rank_pattern": {"lm_head": 3, "model.embed_tokens": 6},
        "alpha_pattern": {"embed_.*": 3},
    },
    "ranks": {
        "target_modules": list(ALL_MODULES),
        "rank_pattern": {
            "q_proj": 3,
            "^model.layers.1.self_attn.k_proj": 5,
            "^layers.2.self_attn.k_proj": 6,
            r"[0-9]\.mlp\.(up|down)_proj": 7,
            "proj": 9,
            r".*_proj\b": 2,
        },
    },
    "alphas": {
        "target_modules": list(ALL_MODULES),
        "alpha_pattern": {"q_proj": 3, r"1\.mlp\..*": 5.5, "0.self_attn.k|v_proj": 7},
    },
    "rank-stabilized": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj|k_proj": 3, "layers.7.mlp.up_proj": 6},
        "alpha_pattern": {"k_proj": 3, "layers.7.mlp.up_proj": 6},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)
    return ModelConfig.from_folder(folder)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("first_saved", [True, False], ids=["saved by PEFT", "written by hand"])
def test_modules_ranks_and_scalings_are_those_that_peft_gives(
    tmp_path: Path, model: ModelConfig, changes: dict[str, object], first_saved: bool
) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 10} | changes
    if first_saved:
        LoraConfig(r=4, lora_alpha=10, **changes).save_pretrained(tmp_path)
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    config = read_config(tmp_path, module_names(model))
    found = {}
    for place in select(tmp_path, config, model).places:
        name = model.family.module_name(*place)
        found[name] = (config.rank_of(name), config.scaling_of(name))
    assert found == peft_modules(tmp_path)


def peft_modules(folder: Path) -> dict[str, tuple[int, float]]:
    """Rank and scaling by name, of all modules that PEFT changes for a folder's config."""
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT warns of patterns without a match.
        warnings.simplefilter("ignore")
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=NUM_LAYERS,
                num_attention_heads=2,
            )
        )
        model = get_peft_model(base, LoraConfig.from_pretrained(folder))
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


# --- Any config at all --------------------------------------------------------------------------

PLACES: list[Place] = [(layer, module) for layer in range(NUM_LAYERS) for module in ALL_MODULES]
PLACES += [(None, "embed_tokens"), (None, "lm_head")]
NAMES = {FAMILIES["LlamaForCausalLM"].module_name(*place): place for place in PLACES}

#: Pieces of names and of regular expressions, which make sense together now and then.
REGEX = ("", ".", r"\.", "|", "^", "$", "(q|v)", "[0-9]", r"\d+", ".*", "_proj", "(", ")", "(?i)")
WORDS = ("model", "layers", "self_attn", "mlp", *map(str, range(NUM_LAYERS)), "lm_head", "embed")
pieces = st.sampled_from([*ALL_MODULES, *WORDS, *REGEX])
patterns = st.lists(pieces, max_size=6).map("".join)
names = st.one_of(
    patterns,
    st.sampled_from(sorted(NAMES)),
    st.sampled_from([*ALL_MODULES, "embed_tokens", "lm_head"]),
)


@given(
    st.fixed_dictionaries(
        {"target_modules": st.one_of(st.lists(names, max_size=4), patterns)},
        optional={
            "exclude_modules": st.one_of(st.lists(names, max_size=3), patterns),
            "layers_to_transform": st.one_of(
                st.integers(0, 12), st.lists(st.integers(0, 12), max_size=3)
            ),
            "layers_pattern": st.one_of(st.lists(patterns, max_size=2), patterns),
        },
    )
)
def test_a_config_selects_what_peft_selects_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, model: ModelConfig, targets: dict[str, object]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 10} | targets
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    try:
        config = read_config(folder, module_names(model))
        found = select(folder, config, model).places
    except BadInput as error:
        if "targets nothing" not in str(error):
            return
        found = []
    assert found == list(peft_selects(LoraConfig(**targets)))


def test_a_long_list_of_names_is_compared_at_once(tmp_path: Path, model: ModelConfig) -> None:
    names = [f"{number:x}" for number in range(100_000)]
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": [*names, "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    begun = time.process_time()
    config = read_config(tmp_path, module_names(model))
    assert len(select(tmp_path, config, model).places) == NUM_LAYERS
    assert time.process_time() - begun < 2


def peft_selects(config: LoraConfig) -> Iterator[Place]:
    for name, place in NAMES.items():
        found = check_target_module_exists(config, name)
        if found and not isinstance(found, _ExcludedModule):
            yield place


@given(st.dictionaries(names, st.integers(1, 9), max_size=5), st.sampled_from(sorted(NAMES)))
def test_a_pattern_gives_the_rank_that_peft_finds(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[str, int], name: str
) -> None:
    folder = tmp_path_factory.mktemp("config")
    settings = {"peft_type": "LORA", "r": 10, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": ranks}))
    try:
        expected = ranks.get(get_pattern_key(ranks, name), 10)
        found = read_config(folder, [name]).rank_of(name)
    except (re.error, BadInput):  # PEFT finds out once it comes to it.
        return
    assert found == expected
