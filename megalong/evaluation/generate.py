"""`megalong generate`: a prompt in, the model's continuation out, on one process.

    prompt ─ tokenizer ─▶ ids ─ prefill, `prefill_chunk` tokens at a time ─▶ cache ─ one token at a time ─▶ text

The prompt's length is bounded by the cache alone: activations are those of one chunk, and logits are computed for the
last token only. Sampling draws on the CPU from float32 probabilities, so that a seed gives the same tokens wherever
the logits are the same.

Cuts are applied in the order of `transformers`: temperature, then top-k, then top-p (Holtzman et al.,
arXiv 1904.09751).
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
    """How the next token is chosen; temperature 0 takes the likeliest.

    Raises:
        UserError: a value outside its range, or a cut without a temperature.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature:g}: must be 0 (the likeliest token) or above; write 0.7")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: a share of probability, above 0 and up to 1; write 0.9")
        cut = "--top-p" if self.top_p is not None else "--top-k" if self.top_k is not None else None
        if cut and not self.temperature:
            raise UserError(f"{cut} cuts what is sampled, but temperature 0 samples nothing; add --temperature 1")


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
        prompt: the text itself; or else `prompt_file`, a file that holds it.
        dtype: type to compute in, as `find_model` has it.

    Raises:
        UserError: no such model, tokenizer, template or file; nothing to read; sampling that contradicts itself.
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
        words, ids, named = template.words, _asked(template, text), template.tokenizer
    else:
        named = open_tokenizer(folder, str(source))
        words = Words(folder, named)
        ids = words.prompt(text)
    _check_ids(ids, source)
    ends = end_ids(folder, words.tokenizer.token_to_id(named.eos_token) if named.eos_token else None)
    answer = _answer(source, ids, max_new_tokens, sampling, prefill_chunk, ends)
    print(words.decode(answer))


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UserError("give exactly one prompt: --prompt TEXT or --prompt-file F")
    try:
        if prompt is not None:
            prompt.encode("utf-8")
            return prompt
        return Path(str(prompt_file)).read_text(encoding="utf-8")
    except UnicodeEncodeError:  # the shell's bytes were no UTF-8
        raise UserError("--prompt: not UTF-8 text; write it to a file of that encoding, --prompt-file F") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {prompt_file}: not UTF-8 text; convert it first") from None
    except OSError as error:
        raise UserError(f"--prompt-file {prompt_file}: {error.strerror}; give a text file") from None


def _check_tokenizer(folder: Path, source: ModelSource) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{source} holds no tokenizer; put the model's tokenizer.json into {folder}")


def _asked(template: ChatTemplate, text: str) -> list[int]:
    """Ids of `text` as a user's turn, up to where the answer begins; a template writes its special tokens itself."""
    from megalong.sft.formats import BadSampleError, Conversation

    turns = Conversation([{"role": "user", "content": text}])
    try:
        template.refuse_added(turns)
        return template.tokens(template.text(turns.messages, prompt=True))[0]
    except BadSampleError as error:
        raise UserError(f"--chat: {error}; leave --chat out, and write all of the conversation in the prompt") from None


def _check_ids(ids: list[int], source: ModelSource) -> None:
    if not ids:
        raise UserError("the prompt is empty; write at least one word")
    if max(ids) >= source.architecture.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has id {max(ids)}, its model only {source.architecture.vocab_size} ids; take "
            "both from one release"
        )


def end_ids(folder: Path, of_tokenizer: int | None = None) -> set[int]:
    """Ids that end an answer: generation_config.json's `eos_token_id` (one or a list), config.json's, the tokenizer's.

    The first file that names any decides, as in `transformers`.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            if ids is not None:
                return set(ids) if isinstance(ids, list) else {ids}
    return set() if of_tokenizer is None else {of_tokenizer}


def _answer(
    source: ModelSource, ids: list[int], max_new_tokens: int, sampling: Sampling, prefill_chunk: int, ends: set[int]
) -> list[int]:
    """Join a world of one, load, generate, leave."""
    from megalong.runtime.distributed import choose_device
    from megalong.runtime.world import logged, world

    with world(choose_device(), Grid()), logged():
        # Imports the model, and with it Megatron-Core: only now is the process prepared for that.
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
    """The ids that follow `prompt` (at least one id), one by one, up to and without the first of `ends`.

    Args:
        model: whole on this rank, in evaluation or training mode (there is no dropout).
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
    for made in range(max_new_tokens):
        token = choose_token(logits[0], sampling, generator)
        if token in (ends or ()):
            return
        yield token
        if made + 1 < max_new_tokens:
            logits = model.next_logits(torch.tensor([[token]], device=device), cache)


def choose_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from float32 logits [V]; `generator` lies on the CPU."""
    import torch

    if not sampling.temperature:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.cpu() / sampling.temperature, -1)
    probabilities, order = probabilities.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities[sampling.top_k :] = 0
        probabilities /= probabilities.sum()
    if sampling.top_p is not None:
        # Those before which less than top_p has been gathered: the first one always is.
        probabilities[probabilities.cumsum(0) - probabilities >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
