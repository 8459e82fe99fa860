"""`megalong generate`: continue a prompt, in one process.

    prompt ─ tokenizer ─▶ ids ─ prefill, `prefill_chunk` tokens at a time ─▶ cache ─ one token at a time ─▶ text

Only the cache limits the prompt's length: activations are those of one chunk, and logits are computed only for the last
token. Sampling draws on the CPU from float32 probabilities, so equal logits and an equal seed give equal tokens.

The order is that of `transformers`: temperature, then top-k, then top-p (Holtzman et al., arXiv 1904.09751).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megalong.checkpoint.folder import ASSETS
from megalong.errors import UserError
from megalong.evaluation.source import ModelSource, beyond_trained, find_model
from megalong.hf.config import read_json
from megalong.runtime.grid import Grid

log = logging.getLogger("megalong")

if TYPE_CHECKING:
    import torch

    from megalong.model.llama import LlamaModel
    from megalong.sft.template import ChatTemplate


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the most likely one.

    Raises:
        UserError: a value is out of range, or top-k or top-p is set without a temperature.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature:g}: must be 0 (most likely token) or above; write 0.7")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: must be a probability above 0 and up to 1; write 0.9")
        cut = "--top-p" if self.top_p is not None else "--top-k" if self.top_k is not None else None
        if cut and not self.temperature:
            raise UserError(f"{cut} limits sampling, but temperature 0 does not sample; add --temperature 1")


def generate(
    *,
    checkpoint: str | None = None,
    hf: str | None = None,
    prompt: str | None = None,
    prompt_file: str | None = None,
    chat: bool = False,
    dtype: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 1234,
    prefill_chunk: int = 4096,
) -> None:
    """Print the model's continuation of `prompt`, or with `chat` its answer, to stdout.

    Args:
        checkpoint: a run's folder (its newest step) or one step's; or else `hf`, a Hugging Face folder.
        prompt: the text; or else `prompt_file`, a file with the text.
        dtype: type to compute in, see `find_model`.

    Raises:
        UserError: no such model, tokenizer, template or file; an empty prompt; contradicting sampling options.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("generate runs in one process, but torchrun started several; start it without torchrun")
    sampling = Sampling(temperature, top_p, top_k, seed)
    source = find_model(checkpoint, hf, dtype)
    folder = Path(hf) if hf is not None else Path(str(source.checkpoint)) / ASSETS
    _check_tokenizer(folder, source)
    from megalong.sft.template import ChatTemplate
    from megalong.sft.words import Words, open_tokenizer

    text = _read_prompt(prompt, prompt_file)
    if chat:
        template = ChatTemplate(folder, "--chat")
        words, ids, tokenizer = template.words, _chat_prompt(template, text), template.tokenizer
    else:
        tokenizer = open_tokenizer(folder, str(source))
        words = Words(folder, tokenizer)
        ids = words.prompt(text)
    _check_ids(ids, source)
    ends = end_ids(folder, words.tokenizer.token_to_id(tokenizer.eos_token) if tokenizer.eos_token else None)
    answer = _generate(source, ids, max_new_tokens, sampling, prefill_chunk, ends)
    print(words.decode(answer))


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UserError("give exactly one prompt: --prompt TEXT or --prompt-file F")
    try:
        if prompt is not None:
            prompt.encode("utf-8")
            return prompt
        return Path(str(prompt_file)).read_text(encoding="utf-8")
    except UnicodeEncodeError:  # the shell's bytes were not UTF-8
        raise UserError("--prompt: not UTF-8 text; write it to a UTF-8 file and give --prompt-file F") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {prompt_file}: not UTF-8 text; convert it first") from None
    except OSError as error:
        raise UserError(f"--prompt-file {prompt_file}: {error.strerror}; give a text file") from None


def _check_tokenizer(folder: Path, source: ModelSource) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{source} has no tokenizer; put the model's tokenizer.json into {folder}")


def _chat_prompt(template: ChatTemplate, text: str) -> list[int]:
    """Ids of `text` as a user's turn, up to the start of the answer; the template adds the special tokens."""
    from megalong.sft.formats import BadSampleError, Conversation

    turns = Conversation([{"role": "user", "content": text}])
    try:
        template.refuse_added(turns)
        return template.tokens(template.text(turns.messages, prompt=True))[0]
    except BadSampleError as error:
        raise UserError(f"--chat: {error}; leave --chat out, and write the whole conversation in the prompt") from None


def _check_ids(ids: list[int], source: ModelSource) -> None:
    if not ids:
        raise UserError("the prompt is empty; write at least one word")
    if max(ids) >= source.architecture.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has id {max(ids)}, its model only {source.architecture.vocab_size} ids; use "
            "both of one release"
        )


def end_ids(folder: Path, of_tokenizer: int | None = None) -> set[int]:
    """Ids that end an answer: `eos_token_id` of generation_config.json (one or a list) or config.json, the tokenizer's.

    The first of these that is set is used, as in `transformers`.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            if ids is not None:
                return set(ids) if isinstance(ids, list) else {ids}
    return set() if of_tokenizer is None else {of_tokenizer}


def _generate(
    source: ModelSource, ids: list[int], max_new_tokens: int, sampling: Sampling, prefill_chunk: int, ends: set[int]
) -> list[int]:
    """Join a world of one process, load the model, generate, leave the world."""
    from megalong.runtime.distributed import choose_device
    from megalong.runtime.world import console_logging, world

    with world(choose_device(), Grid()), console_logging():
        # These import Megatron-Core, for which the process must be prepared first.
        from megalong.evaluation.measure import load_model
        from megalong.model.build import unwrap

        if (warning := beyond_trained(source, len(ids) + max_new_tokens, "prompt and --max-new-tokens")) is not None:
            log.warning(warning)
        model = unwrap(load_model(source)[0])
        return list(new_tokens(model, ids, max_new_tokens, sampling, prefill_chunk, ends))


def new_tokens(
    model: LlamaModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    prefill_chunk: int = 4096,
    ends: set[int] | None = None,
) -> Iterator[int]:
    """The ids that follow `prompt` (at least one id), one by one, up to but without the first of `ends`.

    Args:
        model: the whole model, in evaluation or training mode (there is no dropout).
        prefill_chunk: prompt tokens read at a time; the result does not depend on it.
    """
    import torch

    from megalong.model.kv_cache import KVCache

    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(model.parameters()).device
    model.eval()
    cache = KVCache(len(prompt) + max_new_tokens)
    for chunk in torch.tensor(prompt, device=device).split(prefill_chunk):
        logits = model.next_logits(chunk[None], cache)
    for index in range(max_new_tokens):
        token = choose_token(logits[0], sampling, generator)
        if token in (ends or ()):
            return
        yield token
        if index + 1 < max_new_tokens:
            logits = model.next_logits(torch.tensor([[token]], device=device), cache)


def choose_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from float32 logits [V]; `generator` is on the CPU."""
    import torch

    if not sampling.temperature:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.cpu() / sampling.temperature, -1)
    probabilities, order = probabilities.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities[sampling.top_k :] = 0
        probabilities /= probabilities.sum()
    if sampling.top_p is not None:
        # Keep the tokens before which the sum is below top_p; the first is always kept.
        probabilities[probabilities.cumsum(0) - probabilities >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
