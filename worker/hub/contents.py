"""What is taken from repositories of the hub: never pickles, never code."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from schemas.errors import BadInput
from schemas.hub import HubSource
from worker.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

#: Config, tokenizer and chat template of a model, at the top of its repository.
_OUTLINE = re.compile(
    r"(?:config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template)\.json|chat_template\.jinja|tokenizer\.model|merges\.txt"
)

#: Its weights, as transformers names them, in one file or in shards; some repositories hold them in
#: other forms too.
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Contents:
    """Repositories of one kind."""

    choose: Callable[[HubSource, Collection[str]], list[str]]
    """The files that are wanted of those that there are; raises BadInput if one is missing."""
    remedy: str
    """What to do if the cache lacks them and the hub cannot be asked."""
    trusts_cache: bool = False
    """Whether files that stand in the cache already are not hashed once more: gigabytes."""


def _adapter_files(source: HubSource, names: Collection[str]) -> list[str]:
    if CONFIG_FILE not in names:
        raise BadInput(f"{source} is no PEFT adapter: it lacks {CONFIG_FILE}.")
    if WEIGHTS_FILE not in names:
        hint = _about_pickles(names, "the adapter anew with PEFT's")
        raise BadInput(f"{source} lacks {WEIGHTS_FILE}.{hint}")
    return [CONFIG_FILE, WEIGHTS_FILE]


def _model_files(source: HubSource, names: Collection[str]) -> list[str]:
    return [*_outline_files(source, names), *_weight_files(source, names)]


def _weight_files(source: HubSource, names: Collection[str]) -> list[str]:
    if _SINGLE in names:
        return [_SINGLE]
    shards = {name: int(found[1]) for name in sorted(names) if (found := _SHARD.fullmatch(name))}
    if _INDEX not in names or not shards:
        hint = _about_pickles(names, "the model anew with transformers'")
        raise BadInput(f"{source} holds neither {_SINGLE} nor shards of it with {_INDEX}.{hint}")
    if set(shards.values()) != {len(shards)}:
        raise BadInput(f"{source} holds {len(shards)} shards of {max(shards.values())}.")
    return [_INDEX, *shards]


def _outline_files(source: HubSource, names: Collection[str]) -> list[str]:
    if "config.json" not in names:
        raise BadInput(f"{source} is no model: it lacks config.json.")
    return sorted(filter(_OUTLINE.fullmatch, names))


def _about_pickles(names: Collection[str], remedy: str) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not pickles:
        return ""
    return (
        f" {pickles[0]} is a pickle, which can run code when it is read and is never loaded; save"
        f" {remedy} save_pretrained."
    )


ADAPTER = Contents(
    _adapter_files,
    "`producer lora load` lets a fetcher bring what the hub has of it, if that shares the cache"
    " (HF_HOME).",
)

_ONCE_ONLINE = "Start once where the hub can be asked, or name a cache that has it by HF_HOME."

#: A model, and one without its weights.
MODEL = Contents(_model_files, _ONCE_ONLINE, trusts_cache=True)
MODEL_OUTLINE = Contents(_outline_files, _ONCE_ONLINE, trusts_cache=True)
