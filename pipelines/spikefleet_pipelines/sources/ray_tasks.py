"""Running the jobs of a conversion one after another, or as Ray tasks."""

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import Any, TypeVar

_WORTH_RAY = 10_000
"""Images from which on a local Ray, whose start takes seconds, pays for itself."""

_OBJECT_STORE_BYTES = 200_000_000
"""Jobs and results are names and hashes; images go from file to file."""

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Job], Result], jobs: Sequence[Job], parallel: int | None, images: int
) -> Generator[Result, None, None]:
    """`function` of each job, in the order of the jobs.

    Args:
        parallel: how many at a time. None: as many as the running Ray has CPUs; where none is running, as many as this
            machine has, or one, in this process, when there are fewer than 10,000 images. A local Ray is started for
            more than one, and shut down afterwards, if none is running.
        images: how many the jobs convert in all.

    Raises:
        ValueError: what `function` raised first, as it raised it.
    """
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel is {parallel}; it must be at least 1")
    # Importing Ray takes a second, and one that is not imported is not running.
    running_ray = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    little = images < _WORTH_RAY or os.cpu_count() == 1
    if parallel == 1 or (parallel is None and not running_ray and little):
        for job in jobs:
            yield function(job)
        return
    import ray

    if not running_ray:
        ray.init(
            address="local",
            num_cpus=parallel,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    at_once = parallel or max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(num_cpus=1)(function)
    waiting = iter(jobs)
    running: deque[Any] = deque(task.remote(job) for job in islice(waiting, at_once))
    try:
        while running:
            result = ray.get(running[0])
            running.popleft()
            running.extend(task.remote(job) for job in islice(waiting, 1))
            yield result
    except ray.exceptions.RayTaskError as error:
        # Ray's own text is a traceback of the worker; users get the sentence.
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise
    finally:
        if not running_ray:
            ray.shutdown()
        elif running:
            # Not ray.cancel: where a task ends just then, it brings the whole process down (Ray 2.60 checks that it was
            # pending).
            ray.wait(list(running), num_returns=len(running))
