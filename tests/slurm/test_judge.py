"""Bad nodes among made-up ones: each rule names its node, and only that one."""

from __future__ import annotations

import dataclasses

import pytest

from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.runtime.bandwidth import Bandwidth, neighbour
from megalong.runtime.node_report import NodeReport
from megalong.training import node_judge as judge

VERSIONS = {"torch": "2.13.0", "nccl": "2.27.3"}
NODES = ("n0", "n1", "n2", "n3")
GIB = 2**30


def reports(**changed):
    """Two ranks on each of four healthy nodes; `changed` has other values for a node."""
    return [
        dataclasses.replace(NodeReport(rank, node, VERSIONS, 2, 80 * GIB, 1e-3), **changed.get(node, {}))
        for rank, node in enumerate(node for node in NODES for _ in range(2))
    ]


def config(tmp_path, **sections):
    shape = {"hidden_size": 4096, "ffn_hidden_size": 14336, "num_layers": 32, "num_attention_heads": 32}
    shape |= {"num_query_groups": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    tree = {
        "run": {"name": "r", "dir": str(tmp_path)},
        "model": {"architecture": {**shape, "rope": {"rope_theta": 500000.0}}},
        "data": {"seq_length": 8192, "mixture": [{"name": "a", "path": "a", "weight": 1.0}]},
        "optimizer": {"lr": 1e-4},
        "training": {"train_iters": 10, "global_batch_size": 8},
        **sections,
    }
    return Config.model_validate(tree)


def test_healthy_nodes_are_not_named():
    assert judge.node_faults(reports()) == []
    assert judge.silent_nodes({report.rank: report for report in reports()}, 8, NODES, 1) == []


def test_a_silent_node_is_named():
    found = {report.rank: report for report in reports() if report.node != "n2"}
    assert judge.silent_nodes(found, 8, NODES, 60) == ["node n2: no answer from rank 4-5 within 60 s"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"faults": ("GPU 1 is taken",)}, "GPU 1 is taken"),
        ({"versions": {**VERSIONS, "nccl": "2.21.5"}}, "nccl 2.21.5, on other nodes 2.27.3"),
        ({"probe_seconds": 2.5e-3}, "rank 2's GPU takes 2.5 x the median time of a product"),
    ],
)
def test_one_bad_node_is_named_in_one_line(change, told):
    (line,) = judge.node_faults(reports(n1=change))
    assert line.startswith("node n1: ")
    assert told in line


def test_of_two_nodes_that_differ_both_are_named():
    found = [report for report in reports(n1={"versions": {"torch": "2.12.0"}}) if report.node in ("n0", "n1")]
    lines = judge.node_faults(found)
    assert [line.split(":")[0] for line in lines] == ["node n0", "node n1"]


def test_a_slow_node_is_named_by_its_better_neighbour():
    fast, slow = Bandwidth(300.0, 45.0, 40.0), Bandwidth(300.0, 4.0, 4.0)
    measured = {"n0": fast, "n1": fast, "n2": slow, "n3": fast}
    assert judge.slow_nodes(measured, None) == ["node n2: 4.00 GB/s to its neighbours, the median is 45.00"]
    broken = {**measured, "n2": dataclasses.replace(fast, inside=20.0)}
    assert judge.slow_nodes(broken, None) == ["node n2: 20.00 GB/s between its GPUs, the median is 300.00"]
    assert judge.slow_nodes({"n0": fast, "n1": slow}, None) == []
    (line,) = judge.slow_nodes({"n0": fast, "n1": slow}, 10.0)
    assert line == "node n1: 4.00 GB/s to its neighbours, below slurm.min_gb_per_s 10"


@pytest.mark.parametrize("nodes", range(2, 9))
def test_neighbours_pair_up_and_nobody_is_left_out(nodes):
    met = set()
    for turn in (0, 1):
        for node in range(nodes):
            other = neighbour(node, nodes, turn)
            if other is not None:
                assert other != node
                assert neighbour(other, nodes, turn) == node
                met.add(node)
    assert met == set(range(nodes))


def test_memory_is_the_states_of_8b(tmp_path):
    """7.5e9 matrix entries: 2 bytes of weights, 4 of gradients, 12 of optimizer over the copies."""
    tp8 = config(tmp_path, parallel={"tensor_model_parallel_size": 8})
    architecture = tp8.model.architecture
    assert judge.state_bytes(tp8, architecture, 8) == pytest.approx(7.505e9 / 8 * 18, rel=1e-3)
    assert judge.state_bytes(tp8, architecture, 64) == pytest.approx(7.505e9 / 8 * (6 + 12 / 8), rel=1e-3)
    one = config(tmp_path)
    with pytest.raises(UserError, match=r"take 52\.4 GiB, and the nodes have 40\.0 GiB for each: raise parallel"):
        judge.memory_faults(one, architecture, reports(**{n: {"memory": 40 * GIB} for n in NODES}), 8)
    (line,) = judge.memory_faults(one, architecture, reports(n3={"memory": 40 * GIB}), 8)
    assert line.startswith("node n3: 40.0 GiB for a rank, but weights, gradients and optimizer state")


def test_a_full_disk_is_told_with_what_is_needed(tmp_path, monkeypatch):
    settings = config(tmp_path, checkpoint={"keep_last": 2})
    architecture = settings.model.architecture
    usage = type("usage", (), {"free": 200 * GIB})
    monkeypatch.setattr(judge.shutil, "disk_usage", lambda path: usage)
    line = judge.disk_fault(settings, architecture, "n0")
    # 8.03 billion weights, each 2 bytes in bf16 and 12 in fp32 (master and both moments).
    assert line == (
        f"node n0: 200.0 GiB free in {tmp_path}, but the run will write 3 more checkpoints of 104.7 GiB: free some "
        "space, or lower checkpoint.keep_last 2"
    )
    usage.free = 315 * GIB
    assert judge.disk_fault(settings, architecture, "n0") is None
