"""What a rank of the worker pool runs in the tests of the optimizer's state."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch


def run(settings: dict[str, Any], *jobs: tuple[str, Any]) -> None:
    """Do `jobs` one after the other in a session of a run.

    Args:
        jobs: ("train", steps), ("load", checkpoint) and ("save", checkpoint); and the last two as "theirs load" and
            "theirs save", with Megatron-Core's own code for the optimizer's state. `buckets` and a number as the first
            job: gradients in buckets of so many elements.
    """
    from megatron.core.distributed import distributed_data_parallel as parallel

    from megalong.checkpoint import store
    from megalong.checkpoint.folder import Meta, read_meta
    from megalong.checkpoint.verification import Verification
    from megalong.checkpoint.writing import complete
    from megalong.training.loop import Trainer
    from tests.training.workers import _Records, _session

    with ExitStack() as stack:
        if jobs[0][0] == "buckets":
            size, jobs = jobs[0][1], jobs[1:]
            given = parallel.DistributedDataParallel.__init__

            def in_buckets(self: Any, config: Any, ddp_config: Any, *arguments: Any, **options: Any) -> None:
                ddp_config.bucket_size = size
                given(self, config, ddp_config, *arguments, **options)

            stack.enter_context(patch.object(parallel.DistributedDataParallel, "__init__", in_buckets))
        session = stack.enter_context(_session(settings))
        built = session.chunks, session.optimizer, session.scheduler
        for what, value in jobs:
            with ExitStack() as own:
                if what.startswith("theirs"):
                    own.enter_context(patch.object(store, "_sharded_optimizer", lambda *_: None))
                if what == "train":
                    trainer = Trainer(session, _Records())  # type: ignore[arg-type]
                    for _ in range(value):
                        trainer._one_step()
                    continue
                path = Path(value)
                if what.endswith("load"):
                    store.load_training(path, *built, read_meta(path), Verification(path))
                    continue
                meta = Meta(
                    step=session.step,
                    architecture=session.architecture,
                    layout=store.current_layout(),
                    optimizer="fully_reshardable",
                    versions=store.versions(),
                )
                complete(store.begin_training(path, *built, meta))
