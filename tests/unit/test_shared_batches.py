"""Slots of batches: one is written again only when no tensor over it is left, and no copy out of it runs."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spikefleet_pipelines.shared_batches import InSlot, SharedBatches, allocating, empty_batch

PAGE = mmap.PAGESIZE


def lent(slots: SharedBatches, value: float, count: int = 6) -> tuple[int, torch.Tensor]:
    """A batch that was asked for, written and received."""
    slot = slots.claim()
    assert slot is not None
    writer = slots.writer(slot)
    with allocating(writer):
        images = empty_batch((count,)).fill_(value)
        assert empty_batch((count,)).data_ptr() != images.data_ptr(), "one batch is in the slot, others elsewhere"
    place = writer.place_of(images)
    assert place == InSlot((count,), torch.float32)
    return slot, slots.lend(slot, place)


@pytest.mark.parametrize(
    "keep",
    [
        lambda images: images[2:],
        lambda images: images.view(2, 3).transpose(0, 1),
        lambda images: images.numpy(),
        lambda images: images.numpy()[1:][1:],
        lambda images: memoryview(images.numpy()),
        lambda images: images.untyped_storage(),
        lambda images: images.requires_grad_() * images,
    ],
)
def test_what_is_kept_of_a_batch_keeps_its_slot(keep: Callable[[torch.Tensor], object]) -> None:
    slots = SharedBatches(2, slot_bytes=PAGE)
    first, images = lent(slots, 1.0)
    kept = keep(images)
    del images
    for value in (2.0, 3.0):
        other, later = lent(slots, value)
        assert other != first
        del later
    assert slots.in_use == 1
    del kept
    assert slots.in_use == 0
    assert lent(slots, 4.0)[0] == first, "the lowest free slot, so that no more than are needed are touched"


def test_slots_run_out_and_come_back() -> None:
    slots = SharedBatches(2, slot_bytes=PAGE)
    held = [lent(slots, 1.0), lent(slots, 2.0)]
    assert slots.claim() is None
    slot = held.pop(0)[0]
    assert slots.claim() == slot, "the last tensor over it is gone"
    assert slots.claim() is None
    slots.forget_asked()
    assert (slots.claim(), slots.claim()) == (slot, None), "one was asked for in vain, the other is in use"
    assert float(held[0][1].sum()) == 12


def test_a_tensor_that_ends_in_another_thread_frees_its_slot() -> None:
    slots = SharedBatches(1, slot_bytes=PAGE)
    held = [lent(slots, 1.0)[1]]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert slots.in_use == 0


def test_what_does_not_fit_is_elsewhere() -> None:
    slots = SharedBatches(1, slot_bytes=PAGE)
    for shape in ((PAGE // 4 + 1,), (0,)):
        writer = slots.writer(0)
        assert writer.place_of(writer(shape, torch.float32)) is None
    writer = slots.writer(0)
    images = writer((4, 4), torch.uint8)
    assert writer.place_of(images) == InSlot((4, 4), torch.uint8)
    assert writer.place_of(images.t()) is None, "in another order than it is read in"
    assert writer.place_of(images[1:]) is None
    assert writer.place_of(images.clone()) is None


def test_tensors_outlive_their_slots() -> None:
    images = lent(SharedBatches(1, slot_bytes=PAGE), 5.0)[1]
    assert images.tolist() == [5.0] * 6


def resident(images: torch.Tensor) -> int:
    """Bytes of memory that the mapping of a tensor takes."""
    address, inside = images.data_ptr(), False
    with Path("/proc/self/smaps").open() as maps:
        for line in maps:
            words = line.split()
            if "-" in words[0]:
                start, end = (int(part, 16) for part in words[0].split("-"))
                inside = start <= address < end
            elif inside and words[0] == "Rss:":
                return int(words[1]) * 1024
    raise AssertionError("no such mapping")


def test_memory_of_free_slots_is_given_back() -> None:
    slots, count = SharedBatches(3, slot_bytes=1 << 24), 1 << 20
    (_, first), (_, second), (_, third) = (lent(slots, value, count) for value in (1.0, 2.0, 3.0))
    assert resident(first) >= 12 * count
    del first, third
    slots.release_memory()
    assert 4 * count <= resident(second) < 5 * count
    assert second.unique().tolist() == [2.0]
    assert lent(slots, 4.0, count)[1].unique().tolist() == [4.0]


class Work:
    """A GPU's work up to a point, for the tests."""

    def __init__(self) -> None:
        self.done = False
        self.waited = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited = True


class Pages:
    """`PageLock` that keeps an account."""

    def __init__(self, works: bool = True) -> None:
        self.works = works
        self.locked: dict[int, int] = {}
        self.marks: list[Work] = []

    def lock(self, address: int, nbytes: int) -> bool:
        assert address % PAGE == nbytes % PAGE == 0
        assert address not in self.locked, "CUDA refuses to register memory twice"
        if self.works:
            self.locked[address] = nbytes
        return self.works

    def unlock(self, address: int) -> None:
        del self.locked[address]

    def reached(self) -> Work:
        self.marks.append(Work())
        return self.marks[-1]


def test_a_slot_waits_for_the_copies_out_of_it() -> None:
    pages = Pages()
    slots = SharedBatches(1, pages, slot_bytes=4 * PAGE)
    slot, images = lent(slots, 1.0)
    address = images.data_ptr()
    assert pages.locked == {address: PAGE}
    del images
    assert slots.claim() is None, "the GPU may still read it"
    slots.release_memory()
    assert pages.locked, "nor are its pages given back"
    pages.marks[0].done = True
    assert slots.claim() == slot
    slots.give_back(slot)
    # A larger batch locks more, a smaller one nothing.
    for count, expected in ((PAGE // 2, 2 * PAGE), (3, 2 * PAGE)):
        lent(slots, 2.0, count)
        pages.marks[-1].done = True
        assert pages.locked == {address: expected}
    slots.release_memory()
    assert not pages.locked


def test_the_end_of_a_loader_waits_for_copies_and_unlocks() -> None:
    pages = Pages()
    slots = SharedBatches(2, pages, slot_bytes=PAGE)
    held = [lent(slots, value)[1] for value in (1.0, 2.0)]
    del slots
    assert len(pages.locked) == 2
    held.pop()
    assert held[0].tolist() == [1.0] * 6
    assert len(pages.locked) == 2
    held.pop()
    assert not pages.locked
    assert [mark.waited for mark in pages.marks] == [True, True]


def test_pages_that_cannot_be_locked_are_used_as_they_are() -> None:
    pages = Pages(works=False)
    slots = SharedBatches(1, pages, slot_bytes=PAGE)
    lent(slots, 1.0)
    assert (slots.in_use, pages.marks) == (0, [])


def test_the_memory_of_numpy_is_not_what_a_slot_waits_for() -> None:
    """Negative control: a view of the mapping itself keeps no slot, which is why none is handed out."""
    slots = SharedBatches(1, slot_bytes=PAGE)
    view = np.frombuffer(slots._map, np.uint8, 8)
    assert slots.claim() == 0
    assert view.tolist() == [0] * 8
