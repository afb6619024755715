"""Makes what a speed test of the engine needs: a model folder without weights, and adapters.

    python -m benchmarks.make_model FOLDER [--adapters 32] [--ranks 8,16,32,64]

FOLDER/model has the shape of Llama-3.1-8B; run it with --load-format dummy. FOLDER/adapters/lora0,
lora1, ... are PEFT adapters on all seven linear modules with random weights, of the ranks in turn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

from worker.model.config import LINEAR_MODULES, ModelConfig
from worker.model.weights import PARENTS, group_of

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}


def make_adapter(folder: Path, model: ModelConfig, rank: int, seed: int) -> None:
    """A PEFT adapter in bfloat16; its factors are as small as trained ones are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)
        return weight.normal_(std=0.02, generator=generator).cpu()

    tensors = {}
    for layer in range(model.num_layers):
        for module in LINEAR_MODULES:
            out_features, in_features = model.linear_shape(module)
            place = f"base_model.model.model.layers.{layer}.{PARENTS[group_of(module)]}.{module}"
            tensors[f"{place}.lora_A.weight"] = normal(rank, in_features)
            tensors[f"{place}.lora_B.weight"] = normal(out_features, rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(LINEAR_MODULES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int, default=32, metavar="N")
    parser.add_argument(
        "--ranks",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[8, 16, 32, 64],
    )
    flags = parser.parse_args()
    (flags.folder / "model").mkdir(parents=True, exist_ok=True)
    (flags.folder / "model" / "config.json").write_text(json.dumps(LLAMA_8B, indent=2))
    model = ModelConfig.from_folder(flags.folder / "model")
    for number in track(range(flags.adapters), description="adapters"):
        rank = flags.ranks[number % len(flags.ranks)]
        make_adapter(flags.folder / "adapters" / f"lora{number}", model, rank, seed=number)


if __name__ == "__main__":
    main()
