"""Makes what a speed test of the engine needs: a model folder without weights, adapters, jobs.

    python -m benchmarks.make_model FOLDER [--adapters 32] [--ranks 8,16,32,64] [--names 1000]

FOLDER/model has the shape of Llama-3.1-8B; run it with --load-format dummy. FOLDER/adapters/lora0,
lora1, ... are PEFT adapters on all seven linear modules with random weights, of the ranks in turn.
FOLDER/base.jsonl, uniform8.jsonl, zipf32.jsonl and distinct32.jsonl are 1,024 jobs each, with
prompts and answers of 128 to 384 tokens: for the base model, 8 adapters in turn, 32 by popularity
(Zipf's law) and 32 in turn. prefix8.jsonl is uniform8 with 1,000 tokens before every prompt that
are the same in all. With --names 1000 there are so many adapters, of which those beyond --adapters
share the others' weights on disk, but have an alpha and so a revision of their own; zipf1000.jsonl
is for them, by popularity.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from rich.progress import track
from safetensors.torch import save_file

from schemas.job import Job
from worker.model.config import LINEAR_MODULES, ModelConfig

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


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
            place = f"base_model.model.{model.family.module_name(layer, module)}"
            tensors[f"{place}.lora_A.weight"] = normal(rank, in_features)
            tensors[f"{place}.lora_B.weight"] = normal(out_features, rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    write_config(folder, rank, alpha=2 * rank)


def write_config(folder: Path, rank: int, alpha: float) -> None:
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(LINEAR_MODULES),
        "bias": "none",
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2))


def link_adapter(folder: Path, other: Path, number: int) -> None:
    """An adapter with the weights of another, on disk once, and an alpha that nobody else has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / WEIGHTS).hardlink_to(other / WEIGHTS)
    settings = json.loads((other / CONFIG).read_text())
    write_config(folder, settings["r"], settings["lora_alpha"] + number / 1000)


def make_jobs(workload: str) -> Iterator[Job]:
    """The jobs of one of ``WORKLOADS``, the same ones every time."""
    random = Random(7)
    common = [Random(8).randrange(1000, 120_000) for _ in range(COMMON_TOKENS.get(workload, 0))]
    for number in range(NUM_JOBS):
        prompt = [random.randrange(1000, 120_000) for _ in range(random.randint(128, 384))]
        num_tokens = random.randint(128, 384)
        adapter = WORKLOADS[workload](random, number)
        yield Job(
            id=f"{workload}-{number}",
            prompt_token_ids=common + prompt,
            max_tokens=num_tokens,
            ignore_eos=True,
            lora=None if adapter is None else f"lora{adapter}",
        )


def _by_popularity(random: Random, count: int) -> int:
    """The adapter number k is wanted 1 / (k + 1) as often as the first."""
    return random.choices(range(count), weights=[1 / (k + 1) for k in range(count)])[0]


NUM_JOBS = 1024

#: The number of the adapter of each job, None for the base model.
WORKLOADS: dict[str, Callable[[Random, int], int | None]] = {
    "base": lambda random, number: None,
    "uniform8": lambda random, number: number % 8,
    "zipf32": lambda random, number: _by_popularity(random, 32),
    "distinct32": lambda random, number: number % 32,
    "prefix8": lambda random, number: number % 8,
    "zipf1000": lambda random, number: _by_popularity(random, 1000),
}

#: With which all prompts of a workload begin.
COMMON_TOKENS = {"prefix8": 1000}


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
    parser.add_argument("--names", type=int, default=0, metavar="N")
    flags = parser.parse_args()
    (flags.folder / "model").mkdir(parents=True, exist_ok=True)
    (flags.folder / "model" / "config.json").write_text(json.dumps(LLAMA_8B, indent=2))
    for workload in WORKLOADS:
        lines = (f"{job.to_wire()}\n" for job in make_jobs(workload))
        (flags.folder / f"{workload}.jsonl").write_text("".join(lines))
    model = ModelConfig.from_folder(flags.folder / "model")
    adapters = flags.folder / "adapters"
    for number in track(range(flags.adapters), description="adapters"):
        rank = flags.ranks[number % len(flags.ranks)]
        make_adapter(adapters / f"lora{number}", model, rank, seed=number)
    for number in range(flags.adapters, flags.names):
        other = adapters / f"lora{number % flags.adapters}"
        link_adapter(adapters / f"lora{number}", other, number)


if __name__ == "__main__":
    main()
