"""The engine's thread: streams, cancelling, full queues, failing steps, draining; an engine that counts stands in."""

import asyncio
import contextlib
import threading

import pytest
from fake_engine import FakeEngine

from ml.errors import UserError
from ml.serve.api.driver import Draining, Driver, QueueFull
from ml.serve.api.stream import RequestError
from ml.serve.sampling import SamplingParams


def drive(test, engine=None, **settings):
    """Runs ``test(driver, engine)`` in an event loop, then ends the driver; nothing may be left in the engine."""
    engine = engine or FakeEngine()
    driver = Driver(engine, **{"capacity": 100, **settings})

    async def main():
        driver.start()
        try:
            await asyncio.wait_for(test(driver, engine), 60)
        finally:
            engine.gate.set()
            await driver.drain(0 if driver.unfinished else 1)
        assert driver.unfinished == 0

    asyncio.run(main())
    assert threading.get_ident() not in engine.threads


async def collect(stream):
    """Tokens of each sample, why it ended, and in how many pieces all came."""
    tokens = {i: [] for i in range(stream.samples)}
    reasons, pieces = {}, 0
    async for delta in stream:
        tokens[delta.index] += delta.tokens
        pieces += 1
        if delta.finish_reason:
            reasons[delta.index] = delta.finish_reason
    return tokens, reasons, pieces


async def submit_all(driver, engine, count, sampling):
    """Several requests, of which the first is in the engine's first step (which waits for the gate), the rest not."""
    tasks = [asyncio.create_task(driver.submit([1], sampling)) for _ in range(count)]
    await until(lambda: driver.unfinished == count * sampling.n)
    engine.gate.set()
    return [await task for task in tasks]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_samples_come_whole_and_in_order():
    async def test(driver, engine):
        streams = [await driver.submit([1, 2], SamplingParams(max_tokens=m, n=n)) for m, n in ((5, 1), (40, 3))]
        for stream, count in zip(streams, (5, 40), strict=True):
            tokens, reasons, _ = await collect(stream)
            assert all(each == list(range(count)) for each in tokens.values())
            assert set(reasons.values()) == {"length"} and len(reasons) == stream.samples

    drive(test)


def test_what_a_slow_reader_has_not_taken_is_merged_and_stops_nobody():
    async def test(driver, engine):
        slow = await driver.submit([1], SamplingParams(max_tokens=5000, n=2))
        quick = await driver.submit([1], SamplingParams(max_tokens=5000))
        await collect(quick)
        await until(lambda: not driver.unfinished)  # ended, though nobody has read a token of the slow one
        tokens, _, pieces = await collect(slow)
        assert pieces == 2 and all(each == list(range(5000)) for each in tokens.values())

    drive(test)


def test_ten_thousand_queued_requests_all_get_their_own_text():
    async def test(driver, engine):
        engine.gate.clear()
        engine.running = 512

        async def one(i):
            tokens, *_ = await collect(await driver.submit([1], SamplingParams(max_tokens=1 + i % 7)))
            assert tokens == {0: list(range(1 + i % 7))}

        tasks = [asyncio.create_task(one(i)) for i in range(10_000)]
        await until(lambda: driver.unfinished == 10_000)
        with pytest.raises(QueueFull):
            await driver.submit([1], SamplingParams())
        engine.gate.set()
        await asyncio.gather(*tasks)
        assert engine.most > 9_000  # the first few ended before the others came

    drive(test, capacity=10_000)


def test_a_full_queue_refuses_and_frees():
    async def test(driver, engine):
        engine.gate.clear()
        stream = await driver.submit([1], SamplingParams(max_tokens=2, n=4))
        with pytest.raises(QueueFull):
            await driver.submit([1], SamplingParams())
        engine.gate.set()
        await collect(stream)
        await until(lambda: not driver.unfinished)
        await collect(await driver.submit([1], SamplingParams(max_tokens=2)))

    drive(test, capacity=2)


def test_what_the_engine_refuses_costs_no_place():
    async def test(driver, engine):
        for _ in range(5):
            with pytest.raises(UserError, match="is empty"):
                await driver.submit([], SamplingParams(n=3))
        assert driver.unfinished == 0

    drive(test, capacity=2)


def test_cancelling_ends_one_sample_or_all():
    async def test(driver, engine):
        engine.gate.clear()  # or all is written before this thread gets to cancel
        one = await driver.submit([1], SamplingParams(max_tokens=1000, n=3))
        one.cancel(1)
        engine.gate.set()
        tokens, reasons, _ = await collect(one)
        assert reasons == {0: "length", 1: "cancelled", 2: "length"} and len(tokens[0]) == len(tokens[2]) == 1000
        whole = await driver.submit([1], SamplingParams(max_tokens=10**6, n=2))
        await anext(whole)
        whole.cancel()
        whole.cancel()
        _, reasons, _ = await collect(whole)
        assert set(reasons.values()) == {"cancelled"} and not engine.samples
        whole.cancel()  # of what has ended: nothing

    drive(test)


def test_a_reader_that_goes_before_it_is_admitted_leaves_nothing():
    async def test(driver, engine):
        engine.gate.clear()
        first = await driver.submit([1], SamplingParams(max_tokens=3))
        await asyncio.sleep(0.05)  # the engine stands in its step
        task = asyncio.create_task(driver.submit([1], SamplingParams(max_tokens=10**6)))
        await until(lambda: driver.unfinished == 2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        engine.gate.set()
        await collect(first)
        await until(lambda: not driver.unfinished and not engine.samples)

    drive(test)


def test_a_step_that_fails_ends_those_that_ran_and_no_others():
    async def test(driver, engine):
        engine.gate.clear()
        engine.errors.extend([None, None, RuntimeError("the device is gone")])
        streams = await submit_all(driver, engine, 3, SamplingParams(max_tokens=50, n=2))
        for stream in streams:
            with pytest.raises(RequestError, match="engine failed"):
                await collect(stream)
        assert driver.unfinished == 0 and driver.healthy and engine.resets == 1 and not engine.samples
        tokens, *_ = await collect(await driver.submit([1], SamplingParams(max_tokens=3)))
        assert tokens == {0: [0, 1, 2]}

    drive(test)


def test_a_request_that_fails_in_a_step_fails_alone():
    async def test(driver, engine):
        engine.gate.clear()
        engine.fail.add("r1")
        good, bad = await submit_all(driver, engine, 2, SamplingParams(max_tokens=9, n=2))
        with pytest.raises(RequestError, match="on this request"):
            await collect(bad)
        tokens, *_ = await collect(good)
        assert len(tokens[0]) == len(tokens[1]) == 9
        await until(lambda: not driver.unfinished and not engine.samples)

    drive(test)


def test_an_engine_that_cannot_be_reset_leaves_nobody_waiting():
    async def test(driver, engine):
        engine.errors.append(RuntimeError("lost"))
        stream = await driver.submit([1], SamplingParams())
        with pytest.raises(RequestError):
            await collect(stream)
        await until(lambda: not driver.healthy)
        with pytest.raises((RequestError, Draining)):
            await driver.submit([1], SamplingParams())

    drive(test, FakeEngine(error_at_reset=RuntimeError("still lost")))


def test_draining_lets_what_runs_end_and_takes_no_more():
    async def test(driver, engine):
        engine.gate.clear()
        stream = await driver.submit([1], SamplingParams(max_tokens=20))
        draining = asyncio.create_task(driver.drain(30))
        await until(lambda: driver.draining)
        with pytest.raises(Draining):
            await driver.submit([1], SamplingParams())
        engine.gate.set()
        tokens, *_ = await collect(stream)
        assert len(tokens[0]) == 20 and await draining

    drive(test)


def test_what_does_not_end_in_time_is_told():
    async def test(driver, engine):
        stream = await driver.submit([1], SamplingParams(max_tokens=10**9))
        assert not await driver.drain(0.05)
        with pytest.raises(RequestError, match="server ended"):
            await collect(stream)

    drive(test)
