"""A walk through spikefleet in cells (`# %%`): open it in an editor that runs cells, or run it whole.

python platform/examples/walk_through.py [DIRECTORY]
"""

# %% A recipe is a typed configuration; overrides are dotted keys.
import sys
from pathlib import Path

import torch

import spikefleet as sf
from spikefleet.config.recipes import load_config
from spikefleet_models.equivalence import check_equivalence
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.reparam import deploy
from spikefleet_pipelines.in_memory import image_batch
from spikefleet_pipelines.opening import open_or_prepare

desk = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
places = {"runs_dir": desk / "runs", "stores_dir": desk / "stores"}
overrides = {"train.epochs": 4, "model.timesteps": 2, "registry.name": "example"}
config = load_config("digits", overrides)
print(f"{config.model.family}, T={config.model.timesteps}, gate {config.model.connection}")

# %% Train. The same call resumes an interrupted run, and finds a finished one.
run = sf.train("digits", overrides, workers=0, **places)
print({name: f"{value:.1%}" for name, value in run.metrics.items()})

# %% Rates: how often the neurons of each layer fire on test images.
model = run.model
test = open_or_prepare(config.data, places["stores_dir"]).split("test")
batch = image_batch(test.gather(range(32)), config.data.transform, channels=1)
with torch.no_grad(), SpikeMonitor(model.network) as monitor:
    model.network(batch.images)
for row in monitor.table():
    print(f"{row['layer']:24s} rate {row['rate']:.3f}, dead {row['dead']:.1%}")

# %% Proof: the deployed form computes what was trained, and the binary, spike-driven form the same, bit by bit.
proof = check_equivalence(deploy(model.network), batch.images[:2], trained=model.network)
print("proved" if proof.passed else f"refuted: {proof.why}")
for layer in proof.layers[:4]:
    print(f"{layer.name:24s} {layer.kind:9s} equal: {layer.equal}")

# %% Energy: the card of the registered network, and the same counts under other constants.
card = model.card
print(f"{card.energy_mj * 1e6:.1f} nJ under {card.constants.name}; ANN twin: {card.twin_ratio:.2f} times as much")
print(f"{card.under('int32-45nm').energy_mj * 1e6:.1f} nJ under int32-45nm")

# %% Registry: the best checkpoint is registered with its proof and its card; deployers ask for it by numbers.
best = sf.registry.best("classification", "top1", where="timesteps<=2 and energy_mj<1", tracking_uri=run.tracking_uri)
print(best.uri, best.aliases, best.tags["spike_driven"])
champion = sf.load("models:/example@champion", runs_dir=places["runs_dir"])
print(champion.predict(test.gather(range(1)))[0]["classes"][0])
