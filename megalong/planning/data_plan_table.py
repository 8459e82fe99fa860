"""The table of `megalong data plan`: one block a stage, for a terminal of 120 columns."""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np

from megalong.config.synthetic import Synthetic
from megalong.planning.stage_plan import DomainPlan, Lengths, StagePlan

BAR = 24


def table(stage: StagePlan) -> str:
    """What the stage will see, as text."""
    config = stage.config
    head = (
        f"{config.run.name}: {config.training.train_iters:,} steps of {config.training.global_batch_size:,} samples of "
        f"{config.data.seq_length:,} tokens, {stage.samples * config.data.seq_length:,} tokens in all, "
        f"{config.data.packing} packing"
    )
    return "\n\n".join([head, _domains(stage.domains), _by_length(stage.domains), _samples(stage), _losses(stage)])


def _domains(domains: list[DomainPlan]) -> str:
    width = max(6, *(len(domain.share.name) for domain in domains))
    lines = [
        f"{'domain':{width}} {'weight':>7} {'samples':>10} {'tokens':>16} {'tokens an epoch':>16} {'epochs':>7} "
        f"{'repeats':>8} {'documents':>11} {'held out':>9}"
    ]
    for domain in domains:
        share = domain.share
        lines.append(
            f"{share.name:{width}} {domain.weight:>7.2%} {share.samples:>10,} {share.tokens:>16,} "
            f"{share.tokens_per_epoch:>16,} {share.epochs:>7.3g} {domain.most_repeats:>8,} {share.documents:>11,} "
            f"{domain.held_out:>9,}"
        )
    return "\n".join(lines)


def _by_length(domains: list[DomainPlan]) -> str:
    """Documents and tokens by doublings, of the datasets and of the run."""
    held = reduce(add, (domain.held for domain in domains))
    seen = reduce(add, (domain.seen for domain in domains))
    lines = [f"{'':>21}   {'training documents':>29}   {'as the run shows them':>29}"]
    lines.append(f"{'tokens of a document':>21}   " + "   ".join([f"{'documents':>15} {'of tokens':>13}"] * 2))
    met = np.flatnonzero(held.documents + seen.documents)
    for doubling in range(int(met[0]), int(met[-1]) + 1):
        span = f"{2**doubling:,} to {2 ** (doubling + 1) - 1:,}"
        share = seen.tokens[doubling] / max(1.0, seen.tokens.sum())
        lines.append(
            f"{span:>21}   {_bucket(held, doubling)}   {_bucket(seen, doubling)}  {'█' * round(share * BAR)}".rstrip()
        )
    return "\n".join(lines)


def _bucket(lengths: Lengths, doubling: int) -> str:
    share = lengths.tokens[doubling] / max(1.0, lengths.tokens.sum())
    return f"{lengths.documents[doubling]:>15,.0f} {share:>13.1%}"


def _samples(stage: StagePlan) -> str:
    """How many samples hold a piece of one document of at least each length."""
    looked_at = len(stage.longest)
    which = "samples" if looked_at == stage.samples else f"of {looked_at:,} samples, evenly spaced,"
    lines = [f"{which} that hold so many tokens of one document in a row:"]
    length = stage.config.data.seq_length
    marks = [2**k for k in range(10, length.bit_length()) if 2**k < length] + [length]
    for mark in marks[-12:]:
        count = int((stage.longest >= mark).sum())
        lines.append(f"{mark:>21,}   {count:>15,} {count / looked_at:>13.1%}")
    return "\n".join(lines)


def _losses(stage: StagePlan) -> str:
    """What is cut or wasted, and what never comes."""
    lines = [
        f"cut: {stage.cut:.1%} of the beginnings and ends of samples cut a document",
        f"wasted: {stage.padding:.2%} of the tokens of samples are padding",
    ]
    data = stage.config.data
    if data.pose is not None:
        lines.append(
            f"positions: {data.pose.chunks} chunks of each {'document or pack' if data.masked else 'sample'} skip "
            f"ahead to at most {data.pose.target_length - 1:,}; held-out samples keep plain ones"
        )
    for entry in data.mixture:
        if entry.seq_length is not None:
            lines.append(
                f"packs: samples of {entry.name} are {data.seq_length // entry.seq_length:,} packs of "
                f"{entry.seq_length:,} tokens, masked from each other"
            )
        if entry.synthetic is not None:
            lines.append(_made_up(entry.name, entry.synthetic, entry.seq_length or data.seq_length))
    for domain in stage.domains:
        documents, tokens = domain.dropped
        if documents:
            lines.append(
                f"never shown: {documents:,} documents of {domain.share.name} with {tokens:,} tokens, dropped by its "
                f"{'length rules' if stage.config.data.packing != 'whole' else 'length rules or too long for a sample'}"
            )
        if domain.share.epochs < 1:
            lines.append(f"not reached: {1 - domain.share.epochs:.1%} of an epoch of {domain.share.name}")
    return "\n".join(lines)


def _made_up(name: str, synthetic: Synthetic, seq_length: int) -> str:
    if synthetic.task == "related":
        return f"synthetic: samples of {name} are related documents joined to one"
    shortest = synthetic.min_length or seq_length
    span = f"{shortest:,} to {seq_length:,}" if shortest < seq_length else f"{seq_length:,}"
    learnt = "answers are" if synthetic.answer_only else "all tokens are"
    return f"synthetic: samples of {name} are {synthetic.task} tasks of {span} tokens in its text, {learnt} learnt"
