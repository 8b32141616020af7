"""Work beside the page: results, progress, cancelling, what a page is told when. A loop stands in for a kernel's."""

import asyncio
import threading
import time

import pytest
import torch

from nbhelpers import inference, jobs
from nbhelpers.jobs import Cancelled, Worker
from nbhelpers.tests.conftest import tiny_network


class Page:
    """What a panel would do with its worker: what was told and what was taken over, and by which thread."""

    def __init__(self):
        self.told, self.taken, self.threads = [], [], set()
        self.worker = Worker(self.tell)

    def tell(self, job):
        self.threads.add(threading.get_ident())
        self.told.append(job.progress())

    def take(self, outcome):
        self.threads.add(threading.get_ident())
        self.taken.append(outcome)


@pytest.fixture
def page():
    return Page()


@pytest.fixture
def hand(monkeypatch):
    """As if a message of the page were being handled."""
    monkeypatch.setattr(jobs, "by_hand", lambda: True)
    monkeypatch.setattr(jobs, "GRACE", 0.01)


def test_code_waits_for_the_result(page):
    page.worker.start(lambda job: 42, page.take)
    assert page.taken == [42] and page.worker.job is None


def test_an_error_is_an_outcome(page):
    page.worker.start(lambda job: 1 / 0, page.take)
    assert isinstance(page.taken[0], ZeroDivisionError)


def test_the_thread_that_starts_takes_over_and_another_one_works(page):
    page.worker.start(lambda job: threading.get_ident(), page.take)
    assert page.threads == {threading.get_ident()} and page.taken[0] != threading.get_ident()


def test_moved_by_hand_it_returns_before_the_work_is_done(page, hand):
    go = threading.Event()

    async def kernel():
        page.worker.start(lambda job: go.wait(30), page.take)
        assert page.taken == [] and page.told == [" …"]  # the page has been told that work goes on
        go.set()
        while not page.taken:
            await asyncio.sleep(0.01)

    asyncio.run(kernel())
    assert page.taken == [True] and page.threads == {threading.get_ident()}


def test_progress_comes_while_the_work_goes_on(page, hand, monkeypatch):
    monkeypatch.setattr(jobs, "EVERY", 0)
    go_on = threading.Event()
    page.worker = Worker(lambda job: (page.tell(job), job.done == 2 and go_on.set()))

    def work(job):
        job.stage("tiles")
        for done in range(3):
            job.step(done, 4)
        return go_on.wait(30)  # the page is told while this thread is at work

    async def kernel():
        page.worker.start(work, page.take)
        while not page.taken:
            await asyncio.sleep(0.01)

    asyncio.run(kernel())
    assert page.taken == [True]
    assert any(text.startswith("tiles: 2 of 4, about") for text in page.told)


def test_cancelling_reaches_the_work_and_a_network_in_the_middle_of_a_tile(page, hand):
    model, entered = tiny_network(2), threading.Event()
    calls = []

    def note(*_):
        calls.append(1)
        entered.set()
        time.sleep(0.05)

    model.register_forward_pre_hook(note)

    def work(job):
        with job.watching(model):
            while True:  # ended by Cancelled alone
                inference.upscale(model, torch.rand(3, 24, 24), progress=job.step)

    async def kernel():
        page.worker.start(work, page.take)
        assert entered.wait(30)
        page.worker.cancel()
        while not page.taken:
            await asyncio.sleep(0.01)

    asyncio.run(kernel())
    assert isinstance(page.taken[0], Cancelled) and page.worker.job is None
    before = len(calls)
    inference.upscale(model, torch.rand(3, 24, 24))  # nothing of the job is left in the network
    assert len(calls) == before + 1


def test_watching_stops_its_own_thread_only(page):
    model = tiny_network(2)

    def work(job):
        job.cancel()
        with job.watching(model):
            other = threading.Thread(target=lambda: found.append(model(torch.rand(1, 3, 8, 8))))
            other.start()
            other.join()
            model(torch.rand(1, 3, 8, 8))

    found = []
    page.worker.start(work, page.take)
    assert len(found) == 1 and isinstance(page.taken[0], Cancelled)


def test_a_newer_job_takes_the_place_of_the_one_at_work(page, hand):
    order = []

    def slow(job):
        try:
            while True:
                job.step(0, 0)
        finally:
            order.append("slow ended")

    async def kernel():
        page.worker.start(slow, page.take)
        page.worker.start(lambda job: order.append("new at work") or "new", page.take)
        while not page.taken:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)

    asyncio.run(kernel())
    assert page.taken == ["new"], "what was overtaken is dropped without a word"
    assert order == ["slow ended", "new at work"], "never two at once"


def test_code_can_wait_for_what_a_hand_started(page, hand):
    async def kernel():
        page.worker.start(lambda job: threading.Event().wait(0.1), page.take)
        assert page.taken == []
        page.worker.wait()
        assert page.taken == [False]
        await asyncio.sleep(0.05)

    asyncio.run(kernel())
    assert page.taken == [False], "taken over once"


def test_outside_a_kernel_nothing_is_moved_by_hand():
    assert jobs.by_hand() is False
