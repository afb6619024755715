"""The command ``worker``. Its flags are called like those of SGLang's server."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.command import add_server_flags, awaited_server, new_parser, on_signal, run_command

if TYPE_CHECKING:
    from worker.model_place import ModelPlace

DESCRIPTION = """\
Claims jobs from a queue, runs them in batches over many LoRA adapters, and writes one result a job
back. Ends with status 0 after SIGTERM or Ctrl-C (what runs may finish; a second one hands it back),
1 after a failure, 2 for a wrong flag, model or adapter, 4 if the Redis server cannot be used, 130
after Ctrl-C while it starts. In parentheses: what holds for a flag that is left out.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags; ``worker.config`` checks their values and fills in what is left out."""
    parser = new_parser("worker", DESCRIPTION)
    _add_model_flags(parser.add_argument_group("model"))
    _add_lora_flags(parser.add_argument_group("adapters"))
    _add_batch_flags(parser.add_argument_group("batches and memory"))
    _add_queue_flags(parser.add_argument_group("queue"))
    return parser


def _add_model_flags(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--model-path",
        required=True,
        metavar="MODEL",
        help="folder with config.json, safetensors and tokenizer; where no folder MODEL exists,"
        " OWNER/NAME[@REVISION] is a repository of the Hugging Face hub (hf:OWNER/NAME always is)",
    )
    model.add_argument("--device", metavar="cpu|cuda", help="where it runs (cuda if there is one)")
    model.add_argument(
        "--dtype",
        metavar="auto|float32|float16|bfloat16",
        help="type of its numbers (auto: float32 on a CPU, else as stored)",
    )
    model.add_argument(
        "--load-format",
        metavar="auto|dummy",
        help="dummy: random weights from config.json alone, for speed tests (auto)",
    )
    model.add_argument(
        "--context-length", type=int, metavar="N", help="tokens of prompt and answer (the model's)"
    )


def _add_lora_flags(lora: argparse._ArgumentGroup) -> None:
    lora.add_argument(
        "--enable-lora",
        action="store_true",
        help="serve adapters that are loaded later (on by itself with --lora-paths, --lora-root,"
        " --hub-owners)",
    )
    lora.add_argument(
        "--lora-paths",
        nargs="+",
        metavar="LORA",
        help="PEFT folders: PATH, NAME=PATH, or JSON with lora_name, lora_path and pinned; where no"
        " folder PATH exists, OWNER/NAME[@REVISION] is a repository of the Hugging Face hub"
        " (hf:OWNER/NAME always is)",
    )
    lora.add_argument(
        "--max-loras-per-batch", type=int, metavar="N", help="distinct adapters in a batch (8)"
    )
    lora.add_argument(
        "--max-loaded-loras", type=int, metavar="N", help="adapters in host memory (all)"
    )
    lora.add_argument(
        "--lora-eviction-policy",
        metavar="lru|fifo",
        help="which leaves its slot, or host memory, first: used (lru) or loaded (fifo) longest ago"
        " (lru)",
    )
    lora.add_argument(
        "--lora-root",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders below which `producer lora load` may name adapters (none)",
    )
    lora.add_argument(
        "--hub-owners",
        nargs="+",
        metavar="OWNER",
        help="users and organizations of the hub whose adapters `producer lora load` may name, once"
        " a fetcher has brought them into this machine's hub cache (none)",
    )
    lora.add_argument(
        "--with-fetcher",
        action="store_true",
        help="run a fetcher beside the worker, for a machine alone",
    )
    lora.add_argument(
        "--max-lora-rank", type=int, metavar="N", help="largest rank (of the adapters given)"
    )
    lora.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="MODULE",
        help="modules that adapters may change by LoRA: linear ones, embed_tokens, lm_head, or all"
        " (those of the adapters given)",
    )
    lora.add_argument(
        "--lora-backend",
        metavar="triton|torch",
        help="kernels (triton on a GPU, torch on a CPU)",
    )


def _add_batch_flags(batch: argparse._ArgumentGroup) -> None:
    batch.add_argument(
        "--max-running-requests", type=int, metavar="N", help="jobs that run at once (48; GPU: 256)"
    )
    batch.add_argument(
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        help="prompt tokens in a batch (512; GPU: 8192)",
    )
    batch.add_argument(
        "--disable-prefix-cache",
        action="store_true",
        help="compute every prompt from its first token, whatever stands in the KV cache",
    )
    batch.add_argument("--max-total-tokens", type=int, metavar="N", help="tokens in the KV cache")
    batch.add_argument(
        "--mem-fraction-static",
        type=float,
        metavar="F",
        help="or: its part of the free memory (0.5); GPU: part of the card for all (0.85)",
    )


def _add_queue_flags(queue: argparse._ArgumentGroup) -> None:
    add_server_flags(queue)
    queue.add_argument(
        "--lease-seconds",
        type=float,
        metavar="S",
        help="after which the jobs of a worker that died go to another one (30)",
    )
    queue.add_argument(
        "--max-attempts",
        type=int,
        metavar="N",
        help="of a job before it is given up; from now on, for all workers of the queue (3)",
    )
    queue.add_argument(
        "--patience",
        type=float,
        metavar="S",
        help="after which an adapter, priority or submission that waits unserved comes first (30)",
    )
    queue.add_argument("--burst", action="store_true", help="end when no job is left")


def main() -> None:
    """Run the command; ends the process with its exit status."""
    flags = vars(build_parser().parse_args())
    run_command("worker", lambda: _run(flags))


def _run(flags: dict[str, Any]) -> int:
    # Only now, for --help does without; and without torch, which takes seconds: a mistyped name is
    # told before.
    from worker.logs import configure_logs
    from worker.lora_path import check_folders
    from worker.model_place import find_model

    configure_logs()
    check_folders(flags.get("lora_paths", ()))
    return _serve(flags, find_model(flags["model_path"]))


def _serve(flags: dict[str, Any], model: ModelPlace) -> int:
    from broker.connection import server_errors
    from worker.background import change_threads_often
    from worker.config import WorkerConfig
    from worker.engine import Engine
    from worker.host_memory import keep_freed_memory, leave_alone_what_stays
    from worker.hub.fetcher_process import FetcherProcess
    from worker.worker import Worker

    keep_freed_memory()
    config = WorkerConfig.from_flags(
        {**flags, "model_path": model.folder, "repository": model.repository}
    )
    with awaited_server(config.redis_url, config.redis_password_file) as server:
        if config.load_format != "dummy":
            model.fetch_weights()
        engine = Engine(config)
        worker = Worker(config, engine, server.url)
        leave_alone_what_stays()
        change_threads_often()
        on_signal(worker.stop)
        fetcher = FetcherProcess(config, engine.adapters.loader.limits, server.url)
        with server_errors(server.url), fetcher if config.with_fetcher else nullcontext():
            return worker.run()


if __name__ == "__main__":
    main()
