"""Optimizing in one thread while others run models, draw random numbers, or use the optimized model itself."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn

C = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU()) for _ in range(8)
        )

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for block in self.blocks:
            x = x + block(x) * scale
        return x


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.conv, self.draw = nn.Conv2d(C, C, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) * self.draw()


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Repeat some work in another thread until the block is done; its errors are raised here."""
    stop, started, errors = threading.Event(), threading.Event(), []

    def run() -> None:
        try:
            while not stop.is_set():
                work()
                started.set()
        except BaseException as error:
            errors.append(error)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]


def image() -> Tensor:
    return torch.randn(1, C, 5, 4, generator=torch.Generator().manual_seed(1))


def test_another_thread_runs_a_model() -> None:
    other, x = Net().eval(), image()
    with torch.no_grad():
        expected = other(x)
    runs = 0

    def run() -> None:
        nonlocal runs
        with torch.no_grad():
            assert torch.equal(other(x), expected)
        runs += 1

    with meanwhile(run):
        for _ in range(10):
            before = runs
            model = fastcnn.optimize(Net().eval())
            assert {site.pattern for site in fastcnn.report(model).sites} == {"conv+bn+relu", "add"}
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected)
            while runs == before:
                pass
    assert "__call__" in nn.Module.__dict__
    assert nn.Module.__call__.__name__ in ("_wrapped_call_impl", "__call__")


def test_other_threads_call_the_model_that_traces() -> None:
    model, x = fastcnn.optimize(Net().eval()), image()
    plain = Net().eval()

    def run() -> None:
        with torch.no_grad():
            torch.testing.assert_close(model(x, 1.0), plain(x, 1.0))

    with meanwhile(run), torch.no_grad():
        for i in range(12):  # each a structure of arguments that is new
            torch.testing.assert_close(model(x, i / 8), plain(x, i / 8))


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()))], ids=["python", "torch"])
def test_another_thread_draws_random_numbers(draw: Callable[[], float]) -> None:
    allowed: list[None] = []

    def run() -> None:
        if allowed:
            allowed.pop()
            draw()

    with meanwhile(run):
        for _ in range(5):
            allowed.append(None)  # not in every trace: four in a row would be held for the model's own
            left = fastcnn.report(fastcnn.optimize(Net().eval())).left
            assert [entry.module for entry in left] == ["mul"]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()))], ids=["python", "torch"])
def test_a_model_that_draws_is_found_out_and_its_draws_given_back(draw: Callable[[], float], alone: bool) -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), torch.get_rng_state().tolist()

    net, pause = Drawing(draw), threading.Event()
    before = states()
    if alone:
        model = fastcnn.optimize(net)
    else:
        with meanwhile(lambda: pause.wait(0.01) and None):
            model = fastcnn.optimize(net)
    assert states() == before
    assert "random" in {e.module: e.reason for e in fastcnn.report(model).left}["(model)"]
