"""Which package may import what; held here, since an import is easily added in passing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import kernels
from tests.tiny_models import make_llama

ROOT = Path(__file__).parents[1]

#: For each package those of the project that it may import. No package names worker or producer.
ALLOWED = {
    "schemas": set(),
    "kernels": set(),
    "broker": {"schemas"},
    "producer": {"schemas", "broker"},
    "worker": {"schemas", "kernels", "broker"},
}
#: Top-level folders that hold code but are not installed.
OTHERS = ("benchmarks", "examples", "tests")

#: What runs code that it reads.
UNSAFE_READERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal"}
UNSAFE_READERS |= {"shelve", "jsonpickle"}

packages = pytest.mark.parametrize("package", ALLOWED)


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{ROOT / package} holds no code"
    return found


def modules(package: str) -> list[str]:
    parts = [file.relative_to(ROOT).with_suffix("").parts for file in files(package)]
    return [".".join(part for part in names if part != "__init__") for names in parts]


def nodes(package: str) -> Iterator[ast.AST]:
    """The syntax of all files, function bodies included."""
    for file in files(package):
        yield from ast.walk(ast.parse(file.read_text("utf-8"), str(file)))


def imports(package: str) -> set[str]:
    """Full names of all modules, and of what is taken from them, anywhere in the package."""
    names = set()
    for node in nodes(package):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{package}: a relative import of {node.module}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(package: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(package)}


@packages
def test_a_package_imports_only_those_below_it(package: str) -> None:
    project = ALLOWED.keys() | set(OTHERS)
    assert (top_level(package) & project) - {package} <= ALLOWED[package]


def test_every_package_of_the_project_is_held_to_the_rule() -> None:
    folders = {init.parent.name for init in ROOT.glob("*/__init__.py")}
    assert folders - set(OTHERS) == ALLOWED.keys()


def test_kernels_stand_on_torch_and_triton_alone() -> None:
    foreign = top_level("kernels") - sys.stdlib_module_names - {"kernels"}
    assert foreign <= {"torch", "triton"}


@pytest.mark.parametrize("package", ["schemas", "broker", "producer"])
def test_what_a_producer_runs_never_names_torch(package: str) -> None:
    assert not top_level(package) & {"torch", "transformers", "triton", "safetensors", "peft"}


def loaded_after(*names: str) -> set[str]:
    """Top-level modules that a new process holds once it has imported these."""
    program = f"import sys, {', '.join(names)}\nprint(*(n.split('.')[0] for n in sys.modules))"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ended.stdout.split())


def test_nothing_that_the_producer_imports_imports_torch() -> None:
    loaded = loaded_after(*modules("producer"))
    assert not loaded & {"torch", "transformers", "triton", "worker", "kernels"}


def test_the_producers_command_line_starts_without_redis_and_pydantic() -> None:
    assert not loaded_after("producer.cli") & {"redis", "pydantic", "rich"}


@packages
def test_no_module_is_called_like_one_of_python_or_of_an_installed_package(package: str) -> None:
    installed = {
        name for name, sources in packages_distributions().items() if set(sources) != {"lorry"}
    }
    own = {package} | {part for module in modules(package) for part in module.split(".")}
    assert not own & (sys.stdlib_module_names | installed)


def test_the_hugging_face_package_called_kernels_is_not_installed() -> None:
    """transformers would take it for ours, or ours for it."""
    with pytest.raises(PackageNotFoundError):
        distribution("kernels")


def test_transformers_loads_and_runs_a_model_beside_our_package_called_kernels(
    tmp_path: Path,
) -> None:
    assert kernels.__file__ == str(ROOT / "kernels" / "__init__.py")
    model = LlamaForCausalLM.from_pretrained(make_llama(tmp_path, num_hidden_layers=1))
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 211)


@packages
def test_nothing_reads_pickles(package: str) -> None:
    assert not top_level(package) & UNSAFE_READERS


@packages
def test_nothing_calls_a_loader_that_unpickles(package: str) -> None:
    calls = [node for node in nodes(package) if isinstance(node, ast.Call)]
    assert "torch.load" not in {ast.unparse(call.func) for call in calls} | imports(package)


@packages
def test_nothing_lets_numpy_unpickle(package: str) -> None:
    calls = [node for node in nodes(package) if isinstance(node, ast.Call)]
    assert not any(keyword.arg == "allow_pickle" for call in calls for keyword in call.keywords)
