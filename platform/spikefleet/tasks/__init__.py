"""What a network is trained for. Training, registry, progress and prediction know `Task`, and no task by its name."""

from spikefleet.tasks.task import AnyTask, LossSettings, Task, TaskReport, build_task, task_class

__all__ = ["AnyTask", "LossSettings", "Task", "TaskReport", "build_task", "task_class"]
