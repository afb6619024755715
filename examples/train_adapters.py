"""Train the example adapters with PEFT: three visible behaviours for one small base model.

The adapters differ in rank, in scaling and in the layers they change, as adapters in the wild do,
so that running them together is a fair test of serving. Training needs no GPU and no downloads:
the data comes from `examples.training_data`, the model from `examples.smollm2`.

Usage: python -m examples.train_adapters [NAME ...] [--out DIR]
"""

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from examples.smollm2 import HUB_NAME, ModelNotInstalled, model_folder
from examples.training_data import GENERATORS, Example

HERE = Path(__file__).parent
SEED = 20
BATCH_SIZE = 8
STEPS = 160
WARMUP_STEPS = 10
LEARNING_RATE = 1e-3
STEPS_PER_REPORT = 10
IGNORED = -100  # the label that the loss function of `transformers` skips

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

ADAPTERS = {
    "sql": LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"],
    ),
    "json-facts": LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=32,
        target_modules=ATTENTION,
    ),
    "support": LoraConfig(
        task_type="CAUSAL_LM",
        r=32,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
    ),
}


def train(name: str, base: Path, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """Train one adapter from scratch, reporting the loss and the time left as it goes."""
    model = _with_fresh_adapter(base, ADAPTERS[name])
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, STEPS)
    random = Random(SEED)
    losses: list[float] = []
    started = time.monotonic()

    for step in range(1, STEPS + 1):
        examples = [GENERATORS[name](random) for _ in range(BATCH_SIZE)]
        loss = model(**_batch(tokenizer, examples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, max_norm=1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % STEPS_PER_REPORT == 0:
            mean_loss = sum(losses[-STEPS_PER_REPORT:]) / STEPS_PER_REPORT
            seconds_left = (time.monotonic() - started) / step * (STEPS - step)
            progress = f"step {step}/{STEPS}  loss {mean_loss:.4f}"
            print(f"{name}: {progress}  {seconds_left:.0f} s left", flush=True)

    print(f"{name}: trained in {time.monotonic() - started:.0f} s", flush=True)
    return model


def _with_fresh_adapter(base: Path, config: LoraConfig) -> PeftModel:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return get_peft_model(model, config)


def _batch(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> dict[str, Any]:
    """Turn examples into the model's arguments, with a loss on the answers' tokens only.

    Padding goes to the left, so that all answers end together and the model need not compute
    logits, its largest output by far, for the prompts in front of them.
    """
    prompts = [_prompt_tokens(tokenizer, example.prompt) for example in examples]
    answers = [tokenizer(example.answer + tokenizer.eos_token)["input_ids"] for example in examples]
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    inputs = tokenizer.pad({"input_ids": sequences}, padding_side="left", return_tensors="pt")

    # One more position than the longest answer: each token is predicted from the one before it.
    kept = 1 + max(len(answer) for answer in answers)
    labels = torch.full((len(examples), kept), IGNORED)
    for row, answer in zip(labels, answers, strict=True):
        row[-len(answer) :] = torch.tensor(answer)
    return {**inputs, "labels": labels, "logits_to_keep": kept}


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def show_answers(name: str, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the base model's and the adapter's answers to the example prompts for the adapter."""
    for line in (HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        job = json.loads(line)
        if job["lora"] != name:
            continue
        prompt = job["messages"][0]["content"]
        with model.disable_adapter():
            base_answer = _answer(model, tokenizer, prompt, job["max_tokens"])
        adapter_answer = _answer(model, tokenizer, prompt, job["max_tokens"])
        print(f"\nPrompt:  {prompt}\nBase:    {base_answer}\nAdapter: {adapter_answer}", flush=True)


def _answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_tokens: int
) -> str:
    tokens = torch.tensor([_prompt_tokens(tokenizer, prompt)])
    output = model.generate(input_ids=tokens, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def save(model: PeftModel, folder: Path) -> None:
    """Save the adapter alone, in bfloat16 as its base model is, for use with any copy of it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = HUB_NAME
    # Left to itself PEFT asks the model hub whether the vocabulary has changed.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # an empty form for a model card


def main() -> None:
    """Train the adapters named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    known = ", ".join(ADAPTERS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {known}")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="where to save them")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in ADAPTERS:
            parser.error(f"there is no adapter {name!r}; choose from: {known}")
    try:
        base = model_folder()
    except ModelNotInstalled as error:
        sys.exit(str(error))
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name in arguments.names or ADAPTERS:
        model = train(name, base, tokenizer)
        show_answers(name, model, tokenizer)
        save(model, arguments.out / name)


if __name__ == "__main__":
    main()
