"""The table of `megalong data plan`: one block per stage, for a terminal of 120 columns."""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np

from megalong.config.synthetic import Synthetic
from megalong.planning.stage_plan import DomainPlan, Lengths, StagePlan

BAR = 24


def table(stage: StagePlan) -> str:
    """The plan of a stage, as text."""
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
    """Documents and tokens by doublings of the length, in the datasets and in the run."""
    stored = reduce(add, (domain.stored for domain in domains))
    seen = reduce(add, (domain.seen for domain in domains))
    lines = [f"{'':>21}   {'training documents':>29}   {'in the run':>29}"]
    lines.append(f"{'tokens of a document':>21}   " + "   ".join([f"{'documents':>15} {'of tokens':>13}"] * 2))
    used = np.flatnonzero(stored.documents + seen.documents)
    for doubling in range(int(used[0]), int(used[-1]) + 1):
        span = f"{2**doubling:,} to {2 ** (doubling + 1) - 1:,}"
        share = seen.tokens[doubling] / max(1.0, seen.tokens.sum())
        lines.append(
            f"{span:>21}   {_bucket(stored, doubling)}   {_bucket(seen, doubling)}  {'█' * round(share * BAR)}".rstrip()
        )
    return "\n".join(lines)


def _bucket(lengths: Lengths, doubling: int) -> str:
    share = lengths.tokens[doubling] / max(1.0, lengths.tokens.sum())
    return f"{lengths.documents[doubling]:>15,.0f} {share:>13.1%}"


def _samples(stage: StagePlan) -> str:
    """How many samples contain a piece of one document of at least each length."""
    checked = len(stage.longest)
    which = "samples" if checked == stage.samples else f"of {checked:,} evenly spaced samples, those"
    lines = [f"{which} that contain so many consecutive tokens of one document:"]
    length = stage.config.data.seq_length
    marks = [2**k for k in range(10, length.bit_length()) if 2**k < length] + [length]
    for mark in marks[-12:]:
        count = int((stage.longest >= mark).sum())
        lines.append(f"{mark:>21,}   {count:>15,} {count / checked:>13.1%}")
    return "\n".join(lines)


def _losses(stage: StagePlan) -> str:
    """What is cut or padded, and what is never shown."""
    lines = [
        f"cut: {stage.cut:.1%} of the beginnings and ends of samples cut a document",
        f"wasted: {stage.padding:.2%} of the tokens of samples are padding",
    ]
    data = stage.config.data
    if data.pose is not None:
        lines.append(
            f"positions: {data.pose.chunks} chunks of each {'document or pack' if data.masked else 'sample'} skip "
            f"ahead to at most {data.pose.target_length - 1:,}; held-out samples keep ordinary positions"
        )
    for entry in data.mixture:
        if entry.seq_length is not None:
            lines.append(
                f"packs: samples of {entry.name} are {data.seq_length // entry.seq_length:,} packs of "
                f"{entry.seq_length:,} tokens, masked from each other"
            )
        if entry.synthetic is not None:
            lines.append(_synthetic(entry.name, entry.synthetic, entry.seq_length or data.seq_length))
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


def _synthetic(name: str, synthetic: Synthetic, seq_length: int) -> str:
    if synthetic.task == "related":
        return f"synthetic: samples of {name} are related documents joined to one"
    shortest = synthetic.min_length or seq_length
    span = f"{shortest:,} to {seq_length:,}" if shortest < seq_length else f"{seq_length:,}"
    targets = "answers" if synthetic.answer_only else "all tokens"
    return f"synthetic: samples of {name} are {synthetic.task} tasks of {span} tokens in its text; targets: {targets}"
