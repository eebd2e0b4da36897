"""Where the device's time of one training step goes, kernel by kernel."""

from __future__ import annotations

import torch

from gpu.session import Results, Session
from gpu.steps import DRY, SETUPS, detector, ours

_STEPS = 3
_KERNELS = 25


def profile_step(session: Session, results: Results) -> None:
    """Microseconds a step of the longest kernels of SG ResNet18 and, if torchvision is there, SpikeYOLO s."""
    device = session.device
    torch.backends.cudnn.benchmark = True
    setup = DRY if session.dry else SETUPS["r18_cifar_b256"]
    steps = {"sg_resnet18": ours(setup, device, session.fused, True)}
    if not session.dry:
        steps["spike_yolo_s"] = detector("spike_yolo_s", device, batch=16, side=640)
    kind = torch.profiler.ProfilerActivity.CPU if session.dry else torch.profiler.ProfilerActivity.CUDA
    for name, step in steps.items():
        for _ in range(2 if session.dry else 5):
            step()
        with torch.profiler.profile(activities=[kind]) as profile:
            for _ in range(_STEPS):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        spent: dict[str, tuple[float, int]] = {}
        for event in profile.key_averages():
            total, count = spent.get(event.key[:90], (0.0, 0))
            took = getattr(event, "self_device_time_total", 0.0) or event.self_cpu_time_total
            spent[event.key[:90]] = (total + took, count + event.count)
        longest = sorted(spent.items(), key=lambda item: -item[1][0])[:_KERNELS]
        results[name] = {
            "all_us": round(sum(total for total, _ in spent.values()) / _STEPS, 1),
            "launches": sum(count for _, count in spent.values()) / _STEPS,
            "kernels": {key: [round(total / _STEPS, 1), count / _STEPS] for key, (total, count) in longest},
        }
