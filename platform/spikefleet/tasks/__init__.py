"""Tasks: what a network is trained for. Training, registry and inference depend on `Task` only, not on one task."""

from spikefleet.tasks.task import AnyTask, LossSettings, Task, TaskReport, build_task, task_class

__all__ = ["AnyTask", "LossSettings", "Task", "TaskReport", "build_task", "task_class"]
