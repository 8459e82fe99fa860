"""The steps of the first run on a GPU, in the order of what they settle: a module each, with `run(trial)`.

Seconds are estimates for one H100 with sixteen CPU cores, the process's start included.
"""

from __future__ import annotations

from tests.gpu.harness import Step

STEPS = [
    Step("bundle", 20, "versions, the chip's rates, and which kernels are chosen"),
    Step("kernels", 30, "cuDNN and flash against float64; the shapes of the log-sum-exp"),
    Step("ring", 25, "context parallelism of 4 x 8192 tokens in one process against one whole call"),
    Step("rates", 40, "rates of a recipe's attention, 262,144 tokens, cuDNN beside flash"),
    Step("faked_rank", 60, "one rank of TP 8 of an 8B model at 262,144 tokens: memory, MFU, the top of a profile"),
    Step("whole_run", 90, "megalong train, save in the background, resume, export, evaluate, generate"),
    Step("parity", 60, "ten steps in fp32 as the CPU does them: tests/gpu/test_training.py"),
    Step("engine", 45, "Transformer Engine in bf16 and FP8: attention and linear layers, errors and rates"),
    Step("packs", 40, "masked packs of 64K tokens: waits of the CPU for the GPU, and the GPU's idle share"),
    Step("fp8_training", 60, "training in FP8 beside bf16: tests/gpu/test_transformer_engine.py -k steps"),
    Step(
        "plain_rank",
        55,
        "the faked rank without Transformer Engine and apex: torch's RMSNorm and AdamW, a compiled SwiGLU",
        target="tests.gpu.steps.faked_rank:run_plain",
    ),
]
