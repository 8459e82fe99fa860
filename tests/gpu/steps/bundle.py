"""What is here: versions, the chip's own rates, what the product chooses, and whether what is installed works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import torch
from benchmarks.gpu.device import copy_rate, matmul_rate

from megalong.attention.kernels import choose_kernel
from megalong.attention.transformer_engine import machine_of
from tests.gpu.exact import relative_error
from tests.gpu.harness import Trial

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "transformers",
    "numpy",
)


def run(trial: Trial) -> None:
    """Report what is here and check that it works."""
    trial.figure("python", sys.version.split()[0])
    for package in PACKAGES:
        trial.figure(package, _version(package))
    trial.figure("CUDA", torch.version.cuda)
    trial.figure("cuDNN", torch.backends.cudnn.version())
    on_gpu = trial.device.type == "cuda"
    trial.figure("GPU", _nvidia_smi() if on_gpu else None, headline=True)
    trial.figure("matmul TFLOP/s", matmul_rate(trial.device) / 1e12 if on_gpu else None, headline=True)
    trial.figure("copy TB/s", copy_rate(trial.device) / 1e12 if on_gpu else None, headline=True)
    with trial.part("choices"):
        _choices(trial)
    with trial.part("activation"):
        _activation(trial)
    doctor = subprocess.run([sys.executable, "-m", "megalong", "doctor"], capture_output=True, text=True, check=False)
    print(doctor.stdout)
    trial.check("doctor", doctor.returncode == 0, doctor.stderr.strip()[-200:])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or torch.cuda.get_device_name()


def _choices(trial: Trial) -> None:
    machine = machine_of(trial.device)
    trial.figure("machine", str(machine))
    for dtype, channels in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 128)):
        kernel = choose_kernel(torch.empty(1, 1, 1, channels, dtype=dtype, device=trial.device))
        name = f"kernel of {str(dtype).removeprefix('torch.')} heads of {channels}"
        trial.figure(name, kernel.name, headline=(dtype, channels) == (torch.bfloat16, 128))
        if dtype == torch.bfloat16 and machine.capability is not None and machine.capability >= (9, 0):
            trial.check(f"{name} is cudnn on Hopper", kernel.name == "cudnn", kernel.name)
    if machine.capability is not None and importlib.util.find_spec("transformer_engine"):
        trial.check("Transformer Engine can be imported", machine.has_engine)


def _activation(trial: Trial) -> None:
    """The SwiGLU that a run takes, which on a GPU is compiled and needs a compiler on the node."""
    from megalong.runtime.megatron import prepare

    prepare(trial.device)
    from benchmarks.gpu.rows import architecture

    from megalong.model.config import ModelSettings, transformer_config
    from megalong.model.swiglu import SwiGLU

    module = SwiGLU(transformer_config(architecture("tiny"), ModelSettings()))
    both = torch.randn(64, 1, 256, device=trial.device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(64, 1, 128, device=trial.device, dtype=torch.bfloat16)
    out = module(both)
    true = both.detach().double().requires_grad_()
    gate, up = true.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    ours, theirs = torch.autograd.grad(out, both, grad)[0], torch.autograd.grad(expected, true, grad.double())[0]
    trial.near("SwiGLU", {"out": relative_error(out, expected), "gradient": relative_error(ours, theirs)}, 1e-2)
