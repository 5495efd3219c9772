"""The planner of the arena: nothing alive is overwritten, and memory is shared."""

from __future__ import annotations

import random
import resource

import pytest
import torch

import fastcnn
from fastcnn.graph.freezing.memory import ALIGNMENT, Lifetime, plan_offsets


def assert_sound(needs: list[Lifetime]) -> int:
    """No two buffers that are alive at one step overlap. Returns the arena's size."""
    offsets, total = plan_offsets(needs)
    for i, (a, start_a) in enumerate(zip(needs, offsets, strict=True)):
        assert start_a % ALIGNMENT == 0
        assert start_a + a.size <= total
        for b, start_b in list(zip(needs, offsets, strict=True))[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert start_a + a.size <= start_b or start_b + b.size <= start_a, (a, b)
    return total


def at_once(needs: list[Lifetime]) -> int:
    """The most that is alive at any step, each rounded up to the alignment: no plan can need less."""
    steps = range(max(need.last for need in needs) + 1)
    return max(sum(-(-n.size // ALIGNMENT) * ALIGNMENT for n in needs if n.first <= step <= n.last) for step in steps)


@pytest.mark.parametrize("seed", range(50))
def test_random_lifetimes(seed: int) -> None:
    rng = random.Random(seed)
    needs = []
    for _ in range(rng.randint(1, 60)):
        first = rng.randint(0, 40)
        needs.append(Lifetime(rng.choice([1, 64, 100, 4096, rng.randint(1, 10**6)]), first, first + rng.randint(0, 12)))
    total = assert_sound(needs)
    assert at_once(needs) <= total <= sum(-(-n.size // ALIGNMENT) * ALIGNMENT for n in needs)


def test_a_chain_needs_no_more_than_two_neighbours() -> None:
    sizes = [640, 1280, 128, 2560, 64, 1280]
    needs = [Lifetime(size, i, i + 1) for i, size in enumerate(sizes)]
    assert assert_sound(needs) == at_once(needs) == 2560 + 128


def test_no_buffers_need_no_arena() -> None:
    assert plan_offsets([]) == ([], 0)


@pytest.mark.parametrize(("name", "share"), [("resnet18", 0.4), ("googlenet", 0.35), ("densenet121", 0.5)])
def test_networks_take_a_part_of_what_their_activations_would(name: str, share: float) -> None:
    model = fastcnn.create_model(name)
    with fastcnn.exact():  # Winograd's weights take more room than the plain ones
        frozen = fastcnn.freeze(model, torch.zeros(1, 3, 64, 64))
    memory = frozen.memory()
    assert frozen._plan.arena_bytes == memory.arena
    assert 0 < memory.arena < share * memory.activations
    # googlenet's auxiliary classifiers do not run in eval mode.
    values = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("aux"))
    least = 3.5 * values  # of large fully connected weights: they are stored short
    assert least <= memory.weights < 1.25 * 4 * values
    assert "arena" in str(memory)


def test_branches_write_their_slices_of_a_concatenation() -> None:
    """No copies but the input's conversion: every branch of every inception module lands in place."""
    frozen = fastcnn.freeze(fastcnn.create_model("googlenet"), torch.zeros(1, 3, 64, 64))
    assert [step.operator for step in frozen._recipe.steps].count("copy") == 1


def test_steps_that_share_no_memory_run_side_by_side() -> None:
    """Inception's branches: fewer barriers than steps. A network of small steps: one thread, none at all."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wide, small = torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 32, 32)
        frozen = fastcnn.freeze(fastcnn.create_model("googlenet"), wide)
        frozen(wide)
        assert 9 * 3 < frozen._plan.phase_count < 0.8 * frozen._plan.step_count
        frozen = fastcnn.freeze(fastcnn.create_model("lenet5"), small)
        frozen(small)
        assert frozen._plan.phase_count == 1 < frozen._plan.step_count
        # Of two shortcuts zero channels, in two parts, and pixels beside a convolution; pooling and the last layer.
        image = torch.zeros(1, 3, 32, 32)
        frozen = fastcnn.freeze(fastcnn.create_model("resnet20_cifar"), image)
        frozen(image)
        assert frozen._plan.phase_count == frozen._plan.step_count - (3 + 3 + 1)
    finally:
        torch.set_num_threads(before)


def test_no_page_fault_in_the_steady_state() -> None:
    """The arena was touched when it was made: twenty runs meet fewer new pages than runs."""
    x = torch.zeros(1, 3, 112, 112)
    frozen = fastcnn.freeze(fastcnn.create_model("resnet18"), x)
    for _ in range(3):
        frozen(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        frozen(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20
