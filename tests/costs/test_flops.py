"""FLOPs against torch's own counter and published throughput."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megalong.costs.flops import flops_per_token, matrix_entries, mean_flops_per_token
from tests.architectures import LLAMA_8B, TINY


def test_masked_documents_cost_what_each_costs_alone():
    alone = (100 * flops_per_token(TINY, 100) + 28 * flops_per_token(TINY, 28)) / 128
    assert mean_flops_per_token(TINY, [100, 28, 100, 28]) == pytest.approx(alone)


def test_flops_equal_torchs_own_count():
    """torch counts the full attention square; ours counts the causal half."""
    a = TINY
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=300, attn_implementation="eager"))
    tokens = torch.randint(300, (1, 128))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    causal_saving = 6 * a.num_layers * 128 * a.num_attention_heads * a.kv_channels
    per_token = counter.get_total_flops() / 128
    assert per_token == pytest.approx(flops_per_token(a, 128) + causal_saving, rel=2e-3)


@pytest.mark.parametrize(("window", "frequency"), [(7, None), (100, 2), (128, None), (500, None), (16, (0, 1))])
def test_windowed_layers_attend_to_fewer_pairs(window, frequency):
    """Counted pair by pair in the mask; ours leaves half a key of the diagonal out, in every layer."""
    a, place = TINY.with_window(window, frequency), torch.arange(128)
    distance = place[:, None] - place
    pairs = sum(int(((distance >= 0) & (distance < (w or 128))).sum()) for w in a.layer_windows)
    expected = 6 * matrix_entries(a) + 12 * a.num_attention_heads * a.kv_channels * pairs / 128
    half_a_key = 12 * a.num_attention_heads * a.kv_channels * a.num_layers / 2
    assert abs(expected - flops_per_token(a, 128)) <= half_a_key
    assert flops_per_token(a, 128) < flops_per_token(TINY, 128) or window >= 128


@pytest.mark.parametrize(
    ("tokens_per_second", "length", "mfu"), [(217, 2**20, 0.19), (181, 2**21, 0.31), (84, 2**22, 0.28)]
)
def test_mfu_of_published_long_context_runs(tokens_per_second, length, mfu):
    """UltraLong's tokens/s per H100 and the utilization derived from them in two digits."""
    ours = tokens_per_second * flops_per_token(LLAMA_8B, length) / 989e12
    assert ours == pytest.approx(mfu, abs=0.005)


def test_matrices_of_an_8b_model():
    embedding = 128256 * 4096
    assert matrix_entries(LLAMA_8B) + embedding == pytest.approx(8.03e9, rel=1e-3)
    assert math.isclose(flops_per_token(LLAMA_8B, 8192), 45e9 + 6.4e9, rel_tol=0.01)
