"""Train a spiking network on real digits, look at its rates, prove it, weigh its energy, register it, look it up.

    python platform/examples/train_and_deploy.py [DIRECTORY]

Takes about half a minute on two cores; everything is written below DIRECTORY (the current one if not given).
"""

import sys
from pathlib import Path

import spikefleet as sf
from spikefleet_pipelines.opening import open_or_prepare

desk = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
places = {"runs_dir": desk / "runs", "stores_dir": desk / "stores"}

run = sf.train("digits", {"train.epochs": 4, "model.timesteps": 2, "registry.name": "example"}, workers=0, **places)
print(f"test top-1 {run.metrics['top1']:.1%}; it is {run.promotion.alias or 'without alias'}: {run.promotion.reason}")

model = run.model
print(f"{model.card.energy_mj * 1e6:.1f} nJ an image, mean input of spike-fed layers {model.card.mean_input:.3f}")
for row in model.card.rows()[:3]:
    print(f"  {row['layer']}: fed by {row['input']}, {row['macs'] + row['acs']:,.0f} operations")

test = open_or_prepare(model.config.data, places["stores_dir"]).split("test")
for answer, label in zip(model.predict(test.gather(range(3))), test.labels[:3], strict=True):
    print(f"said {answer['classes'][0]['name']} ({answer['classes'][0]['probability']:.0%}), is {label}")

best = sf.registry.best("classification", "top1", where="timesteps<=2", tracking_uri=run.tracking_uri)
print(f"best at T <= 2: {best.uri}, {best.tags['spike_driven']}, {best.metrics['val/top1']:.1%} on validation")
