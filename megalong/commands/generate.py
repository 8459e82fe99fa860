"""`megalong generate`: continue a prompt, or answer it."""

import argparse
from typing import Any

from megalong.commands.parsing import add_dtype, command, count


def add_generate(commands: Any) -> None:
    parser = command(commands, "generate", "continue a prompt, or answer it", _run_generate)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="CKPT_OR_RUN", help="a run's folder, or one step's")
    model.add_argument("--hf", metavar="DIR", help="Hugging Face folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="F", help="UTF-8 file with the prompt")
    parser.add_argument("--chat", action="store_true", help="write the prompt with the tokenizer's chat template")
    add_dtype(parser)
    parser.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="maximum number of tokens (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 always takes the most likely token (%(default)s)"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens of total share P")
    parser.add_argument("--top-k", type=count, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of sampling (%(default)s)")
    parser.add_argument(
        "--prefill-chunk", type=count, default=4096, metavar="N", help="prompt tokens read at a time (%(default)s)"
    )


def _run_generate(options: argparse.Namespace) -> int:
    from megalong.evaluation.generate import generate

    generate(
        checkpoint=options.checkpoint,
        hf=options.hf,
        prompt=options.prompt,
        prompt_file=options.prompt_file,
        chat=options.chat,
        dtype=options.dtype,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        prefill_chunk=options.prefill_chunk,
    )
    return 0
