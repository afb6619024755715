"""Small real models and adapters, written to disk as users bring them, and the oracle for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_llama(folder: Path, **changes: object) -> Path:
    """A random Llama with sizes that are not round, and grouped query heads."""
    settings = {
        "vocab_size": 211,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": None,
        "bos_token_id": None,
        "initializer_range": 0.15,
    }
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    model.save_pretrained(folder)
    return folder


#: Sizes that are not round, for models of all families.
SIZES: dict[str, object] = {
    "vocab_size": 211,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.15,
}


def make_model(folder: Path, model_type: str, **changes: object) -> Path:
    """A random model of any family, with norms and biases that matter; the sizes are those of the
    text's part, if ``changes`` tell of one."""
    torch.manual_seed(1)
    if "text_config" in changes:
        settings = changes | {"text_config": SIZES | changes["text_config"]}
    else:
        settings = SIZES | changes
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.3))
    model.save_pretrained(folder)
    return folder


def make_adapter(
    model_folder: Path,
    folder: Path,
    *,
    rank: int,
    seed: int,
    target_modules: Sequence[str] | str = ALL_MODULES,
    **changes: object,
) -> Path:
    """A PEFT adapter with weights so large that its answers are unlike any other's.

    ``target_modules`` in one string is a regular expression.
    """
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **changes)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                if "magnitude" in name:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 2))
                else:
                    parameter.normal_(std=0.3 / rank**0.5 if "_B." in name else 0.3)
            elif "modules_to_save" in name:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.1))
    model.save_pretrained(folder)
    return folder


def in_bfloat16(folder: Path, copy: Path) -> Path:
    """A model's or adapter's folder once more, with its tensors rounded to bfloat16."""
    shutil.copytree(folder, copy)
    for file in copy.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return copy


class Oracle:
    """transformers and PEFT, one prompt at a time, greedy."""

    def __init__(
        self, model_folder: Path, adapters: dict[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        # Of transformers' attentions the plain one alone knows soft caps in every version.
        base = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=dtype, attn_implementation="eager"
        )
        self._model = base.eval()
        for number, (name, folder) in enumerate(adapters.items()):
            # Else PEFT would compute adapters of a bfloat16 model in float32.
            named = {"adapter_name": name, "autocast_adapter_dtype": False}
            if number == 0:
                self._model = PeftModel.from_pretrained(base, folder, **named).eval()
            else:
                self._model.load_adapter(folder, **named)

    def generate(
        self, prompt_ids: Sequence[int], adapter: str | None, num_tokens: int, **more: object
    ) -> list[int]:
        """The next ``num_tokens`` tokens; ends early only if the model's own settings say so.
        ``more``: settings of transformers' generate."""
        ids = torch.tensor([prompt_ids])
        settings = more | {
            "max_new_tokens": num_tokens,
            "do_sample": False,
            "attention_mask": torch.ones_like(ids),
        }
        with self._using(adapter):
            out = self._model.generate(ids, **settings)
        return out[0, len(prompt_ids) :].tolist()

    def logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """Those of the token after ``ids``: [vocabulary]."""
        return self.all_logits(ids, adapter)[-1]

    def all_logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """Those of the token after each of ``ids``: [ids, vocabulary]."""
        with self._using(adapter):
            return self._model(torch.tensor([ids])).logits[0]

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        with torch.inference_mode():
            if adapter is not None:
                self._model.set_adapter(adapter)
                yield
            elif isinstance(self._model, PeftModel):
                with self._model.disable_adapter():
                    yield
            else:
                yield


class OracleOfEach(Oracle):
    """A model for each adapter: PEFT cannot have LoRA and a copy of one module in the same."""

    def __init__(self, model_folder: Path, adapters: dict[str, Path]) -> None:
        self._oracles = {
            name: Oracle(model_folder, {name: folder}) for name, folder in adapters.items()
        }
        self._oracles[None] = Oracle(model_folder, {})

    def generate(
        self, prompt_ids: Sequence[int], adapter: str | None, num_tokens: int, **more: object
    ) -> list[int]:
        return self._oracles[adapter].generate(prompt_ids, adapter, num_tokens, **more)

    def all_logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        return self._oracles[adapter].all_logits(ids, adapter)
