"""`megalong data plan`: the data of every stage of a run, before it runs, as tables and plots."""

from __future__ import annotations

from collections.abc import Sequence

from megalong.config.load import load_config
from megalong.config.schema import Config
from megalong.data.vocabulary import model_tokenizer, model_vocabulary
from megalong.errors import UserError
from megalong.hf.known import check_stages
from megalong.planning.data_plan_table import table
from megalong.planning.stage_plan import plan_stage
from megalong.runtime.folders import one_each, refuse_overwriting


def plan(config_file: str, overrides: Sequence[str] = (), png: str | None = None, overwrite: bool = False) -> None:
    """Print the data of every stage of a run, and plot it.

    Args:
        png: where to plot, with the stage's name added if there are several; None: no plot.
        overwrite: overwrite existing pictures.

    Raises:
        UserError: a bad configuration or dataset, a document repeated more often than allowed, an unwritable picture.
    """
    configs = load_config(config_file, list(overrides))
    check_stages(configs)
    _refuse_conversations(configs, config_file)
    pictures = one_each(png, [config.run.name for config in configs])
    refuse_overwriting(pictures, "--png", overwrite)
    stages, vocabulary, tokenizer = [], None, None
    for config in configs:
        vocabulary = model_vocabulary(config) or vocabulary  # a stage may continue with the model of the one before
        tokenizer = model_tokenizer(config) or tokenizer
        stages.append(plan_stage(config, vocabulary, tokenizer))
    for stage in stages:
        print(table(stage), end="\n\n" if stage is not stages[-1] else "\n")
    if not pictures:
        return
    from megalong.planning.data_plan_plot import plot_plan  # matplotlib is slow to import

    for stage, path in zip(stages, pictures, strict=True):
        plot_plan(stage, path)
        print(f"picture: {path}")


def _refuse_conversations(stages: list[Config], config_file: str) -> None:
    """Refuse stages of task sft: they need a tokenizer and a chat template, and `data inspect` shows their samples."""
    chats = [config.run.name for config in stages if config.task == "sft"]
    if chats:
        raise UserError(
            f"{config_file}: {chats[0]} has task sft, and data plan counts the documents of data.mixture only; see "
            f"`megalong data inspect {config_file}` for its conversations, what is dropped and how they are packed"
        )
