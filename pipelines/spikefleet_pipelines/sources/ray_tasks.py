"""Running conversion jobs sequentially or as Ray tasks."""

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import Any, TypeVar

_WORTH_RAY = 10_000
"""Number of images from which a local Ray, whose start takes seconds, saves time."""

_OBJECT_STORE_BYTES = 200_000_000
"""Size of the object store: jobs and results are only names and hashes."""

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Job], Result], jobs: Sequence[Job], parallel: int | None, images: int
) -> Generator[Result, None, None]:
    """Run a function on each job and yield the results in the order of the jobs.

    Args:
        function: to run.
        jobs: its arguments.
        parallel: number of concurrent jobs. None: one per CPU of the running Ray; without Ray one per CPU of this
            machine, or one in this process for fewer than 10,000 images. For more than one, a local Ray is started if
            none is running, and shut down afterwards.
        images: total number of images of the jobs.

    Raises:
        ValueError: `parallel` is below 1, or `function` raised it; the first one is raised unchanged.
    """
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel is {parallel}, expected at least 1")
    if runs_here(parallel, images):
        for job in jobs:
            yield function(job)
        return
    import ray

    running_ray = _is_ray_running()
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
        # Ray's own text is a traceback of the worker; users get the message alone.
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise
    finally:
        if not running_ray:
            ray.shutdown()
        elif running:
            # Not ray.cancel: if a task ends at that moment, it aborts the whole process (Ray 2.60 checks that the task
            # was pending).
            ray.wait(list(running), num_returns=len(running))


def runs_here(parallel: int | None, images: int) -> bool:
    """Whether `run_tasks` runs the jobs in this process; arguments as there."""
    little = images < _WORTH_RAY or os.cpu_count() == 1
    return parallel == 1 or (parallel is None and not _is_ray_running() and little)


def _is_ray_running() -> bool:
    # Importing Ray takes a second, and a Ray that is not imported is not running.
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())
