"""The latency model: pipelines against a simulation of 1F1B, transfers against counts by hand."""

import pytest
from planned_cases import experiment

from ml.plan.latency import LatencyModel, bubble_share, pipeline_seconds
from ml.plan.memory import MemoryModel
from ml.plan.mends import changed, rules_of
from ml.plan.topology import parse


def simulated(stages: int, microbatches: int, forward: float, backward: float) -> float:
    """Runs 1F1B event by event: each stage warms up, alternates, drains; transfers take no time."""
    done: dict[tuple[str, int, int], float] = {}
    orders = []
    for stage in range(stages):
        warm = min(stages - stage - 1, microbatches)
        order = [("f", i) for i in range(warm)]
        for i in range(microbatches - warm):
            order += [("f", warm + i), ("b", i)]
        orders.append(order + [("b", i) for i in range(microbatches - warm, microbatches)])
    clock, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for stage in range(stages):
            if at[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][at[stage]]
            if kind == "f":
                need = 0.0 if stage == 0 else done.get(("f", stage - 1, i))
            elif stage == stages - 1:
                need = done.get(("f", stage, i))
            else:
                need = done.get(("b", stage + 1, i))
            if need is not None:
                clock[stage] = max(clock[stage], need) + (forward if kind == "f" else backward)
                done[kind, stage, i] = clock[stage]
                at[stage] += 1
    return max(clock)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 4), (2, 2), (4, 4), (4, 8), (4, 16), (8, 32)])
def test_the_critical_path_is_that_of_1f1b(stages, microbatches):
    expected = simulated(stages, microbatches, 1.0, 2.0)
    assert pipeline_seconds(stages, microbatches, 3.0, 0.0) == pytest.approx(expected)
    bubble = 1 - microbatches * 3.0 / expected
    assert bubble_share(stages, microbatches) == pytest.approx(bubble)


def test_few_microbatches_and_transfers():
    assert pipeline_seconds(8, 2, 3.0, 0.0) == pytest.approx(simulated(8, 2, 1.0, 2.0))
    # Pipette: transfers between stages are on the path once in each round of as many microbatches as stages.
    assert pipeline_seconds(4, 8, 3.0, 0.5) - pipeline_seconds(4, 8, 3.0, 0.0) == 2 * 2 * 3 * 0.5
    assert bubble_share(4, 8, 2) == 3 / 19
    assert pipeline_seconds(4, 8, 3.0, 0.0, chunks=3) == 8 * 3 + 3


def latency(topology="v5e:4x4", efficiency=0.5, **overrides):
    config = changed(experiment(), {"train.batch_size": 64, **overrides})
    machine = parse(topology)
    model = LatencyModel(machine, MemoryModel(config), efficiency)
    return model.predict(config, rules_of(config, machine.device_count))


FSDP = {"mesh.data": 1, "mesh.fsdp": 16}


def test_weights_are_gathered_twice_and_reduced_once_for_each_microbatch():
    one = latency(**FSDP)
    weights = 2 * (2 * 1024 * 256 + 2 * (256 * 128 * (4 + 4 + 4) + 3 * 256 * 512) + 5 * 256)
    # 4x4 chips: two lines, one link each; the norms are too few to matter. Gradients are float32, so count twice.
    assert one.weights == pytest.approx(4 * weights * 15 / 16 / (2 * 50e9), rel=1e-3)
    assert latency(**FSDP, **{"train.microbatches": 4}).weights == pytest.approx(4 * one.weights)
    assert one.once == 0 and one.bubble == 0


def test_replicas_reduce_once_a_step():
    ddp = {"mesh.data": 16, "mesh.layout": "ddp"}
    one, four = latency(**ddp), latency(**ddp, **{"train.microbatches": 4})
    assert one.weights == four.weights == 0
    assert one.once == four.once > 0
    # ZeRO-1 sends as many bytes of gradients and half again of weights, which are 16 bits instead of 32, back.
    zero1 = latency(**ddp | {"mesh.layout": "zero1"})
    assert zero1.once == pytest.approx(0.75 * one.once, rel=1e-2)


def test_shards_of_replicas_are_summed_once_a_step():
    hybrid = {"mesh.data": 4, "mesh.fsdp": 4}
    one, four = latency(**hybrid), latency(**hybrid, **{"train.microbatches": 4})
    assert one.once == four.once and four.weights == pytest.approx(4 * one.weights)
    weights = 2 * 1024 * 256 + 2 * (256 * 128 * (4 + 4 + 4) + 3 * 256 * 512)
    assert one.once == pytest.approx(2 * 3 / 4 * 4 * weights / 4 / 50e9, rel=0.01)


def test_tensor_parallelism_waits_and_rematerialization_computes():
    tensor = {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 2}
    one = latency(**tensor)
    residual = 64 // 8 * 256 * 256 * 2
    assert one.activations == pytest.approx(3 * 2 * 2 * (2 * 1 / 2 * residual) / 50e9)
    assert latency(**tensor, **{"train.remat": "none"}).activations == pytest.approx(one.activations * 2 / 3)
    assert latency(**FSDP, **{"train.remat": "none"}).compute < latency(**FSDP).compute
    assert latency(**FSDP, efficiency=0.25).compute == pytest.approx(2 * latency(**FSDP).compute)
