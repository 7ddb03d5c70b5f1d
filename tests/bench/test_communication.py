"""The communication model: what theory says of any all-reduce holds of it, and a fit finds what it was made from."""

import itertools

import pytest

from densenet_dist.bench.communication import (
    FABRICS,
    NVLINK,
    Bucket,
    Fabric,
    Link,
    Step,
    all_reduce_s,
    fit_ring,
    predict,
    predict_on,
    ring_s,
    tree_s,
)

COUNTS = (2, 3, 8, 9, 16, 100, 1024)
SIZES = (4.0, 4e3, 4e6, 4e9)
STEP = Step(0.010, (Bucket(3.5e6, 0.5), Bucket(3.5e6, 0.7), Bucket(3.5e6, 0.9), Bucket(3.5e6, 0.98)))
every_fabric = pytest.mark.parametrize("fabric", FABRICS, ids=lambda fabric: fabric.name)


@every_fabric
def test_one_gpu_and_no_bytes_cost_nothing(fabric):
    assert all_reduce_s(1e9, 1, fabric) == all_reduce_s(0, 1024, fabric) == 0
    assert predict_on(STEP, 1, fabric).step_s == STEP.compute_s


@every_fabric
def test_more_bytes_and_more_gpus_never_take_less(fabric):
    for count in COUNTS:
        times = [all_reduce_s(size, count, fabric) for size in SIZES]
        assert times == sorted(times)
        assert times[0] < times[-1]
    powers = [2**power for power in range(11)]
    for size in SIZES:
        times = [all_reduce_s(size, count, fabric) for count in powers]
        # Going to a second node brings its adapters: on equal links it may cost a little less than a longer chain.
        assert all(later > 0.99 * earlier for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("workers", COUNTS)
def test_a_large_message_travels_as_often_as_the_lower_bound_says(workers):
    fabric = Fabric("plain", Link("plain", 1e9, 1e-6))
    assert all_reduce_s(1e12, workers, fabric) == pytest.approx(2 * (workers - 1) / workers * 1e12 / 1e9, rel=1e-4)
    assert all_reduce_s(1.0, workers, fabric) == pytest.approx(2 * (workers - 1) * 1e-6, rel=0.01)


@every_fabric
def test_the_tree_knows_of_nodes_and_wins_where_latency_counts(fabric):
    assert tree_s(4e3, 1024, fabric) < ring_s(4e3, 1024, fabric) / 5
    assert ring_s(4e9, 16, fabric) < tree_s(4e9, 16, fabric)
    # Nodes of 8 pass a small message on 7 + log2(n / 8) times each way; workers all in a row, n - 1 times.
    flat = Fabric("flat", fabric.inside)
    assert tree_s(4e3, 1024, Fabric("nodes", NVLINK, NVLINK)) < tree_s(4e3, 1024, flat) / 50


def test_the_narrowest_connection_decides_and_adapters_add_up():
    nvlink, infiniband, ethernet = FABRICS
    assert [all_reduce_s(1e9, 8, fabric) for fabric in FABRICS] == [all_reduce_s(1e9, 8, nvlink)] * 3
    times = [all_reduce_s(1e12, 64, fabric) for fabric in FABRICS]
    assert times == sorted(times)
    assert infiniband.between.bytes_per_s * 8 / ethernet.between.bytes_per_s == 128
    # Eight adapters of 50 GB/s are more than a GPU's NVLink, which then is the narrowest.
    assert times[2] / times[1] == pytest.approx(18 * 20.6 / 3.125, rel=0.02)


@every_fabric
@pytest.mark.parametrize("workers", COUNTS)
def test_overlap_never_loses_and_never_hides_more_than_there_is(fabric, workers):
    for step in (STEP, Step(1e-4, STEP.buckets), Step(0.01, STEP.buckets, (256.0, 128.0))):
        overlapped, plain = predict_on(step, workers, fabric), predict_on(step, workers, fabric, overlap=False)
        assert step.compute_s < overlapped.step_s <= plain.step_s
        assert overlapped.communication_s == plain.communication_s == pytest.approx(plain.exposed_s)
        assert overlapped.step_s == step.compute_s + overlapped.exposed_s
        # The last bucket cannot leave before the backward pass ends.
        assert overlapped.exposed_s >= all_reduce_s(step.buckets[-1].message, workers, fabric) - 1e-12


def test_the_timeline_of_one_step():
    def cost(message):
        return {1.0: 0.2, 2.0: 0.3, 3.0: 0.1}[message]

    step = Step(1.0, (Bucket(1.0, 0.4), Bucket(2.0, 0.5), Bucket(3.0, 0.8)))
    found = predict(step, cost)  # 0.4-0.6, 0.6-0.9 (it waits for the network), 0.9-1.0; backward ends at 0.8
    assert (found.step_s, found.communication_s, found.exposed_s) == pytest.approx((1.2, 0.6, 0.2))
    assert predict(step, cost, overlap=False).step_s == pytest.approx(1.6)
    blocked = predict(Step(1.0, step.buckets, (2.0, 3.0)), cost)
    assert blocked.step_s == pytest.approx(1.2 + 0.4)
    assert predict(Step(1.0, ()), cost).step_s == 1.0


def test_buckets_beat_one_message_where_bandwidth_counts_and_lose_where_latency_does():
    whole = Step(STEP.compute_s, (Bucket(14e6, 0.98),))
    many = Step(STEP.compute_s, tuple(Bucket(14e6 / 500, 0.98) for _ in range(500)))
    ethernet = FABRICS[2]
    assert predict_on(STEP, 64, ethernet).step_s < predict_on(whole, 64, ethernet).step_s
    assert predict_on(many, 64, ethernet).step_s > predict_on(whole, 64, ethernet).step_s


@pytest.mark.parametrize("workers", [2, 4, 7])
def test_a_fit_finds_the_link_that_made_the_times(workers):
    fabric = Fabric("made", Link("made", 2.5e9, 40e-6))
    sizes = [4.0**power for power in range(5, 13)]
    found = fit_ring([(size, all_reduce_s(size, workers, fabric)) for size in sizes], workers, "found")
    assert found.inside.bytes_per_s == pytest.approx(2.5e9, rel=1e-6)
    assert found.inside.ring_latency_s == pytest.approx(40e-6, rel=1e-6)
    # Times that only rise have no latency rather than one below zero.
    steep = fit_ring([(1e6, 1e-3), (2e6, 2.5e-3), (4e6, 7e-3)], workers, "steep")
    assert steep.inside.ring_latency_s == 0
    flat = fit_ring([(1e3, 1e-3), (1e6, 0.9e-3)], workers, "flat")
    assert all_reduce_s(1e6, workers, flat) == pytest.approx(0.95e-3, rel=0.06)


@pytest.mark.parametrize(("workers", "sizes"), [(1, (1e3, 1e6)), (2, (1e3, 1e3))])
def test_nothing_is_fitted_to_too_little(workers, sizes):
    with pytest.raises(ValueError, match="undecided"):
        fit_ring([(size, 1e-3) for size in sizes], workers, "none")
