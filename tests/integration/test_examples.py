"""The examples run as they are printed; the second finds the run that the first has trained."""

from __future__ import annotations

from pathlib import Path

from support.forked import script

EXAMPLES = Path(__file__).parents[2] / "platform" / "examples"


PROMISES = {
    "train_and_deploy.py": ("it is champion", "nJ an image", "said ", "best at T <= 2: models:/example/1, proved"),
    "walk_through.py": ("is complete", "rate 0.", "proved", "under int32-45nm", "models:/example/1 ('champion',)"),
}


def test_examples_say_what_they_promise(tmp_path: Path) -> None:
    for name, parts in PROMISES.items():
        process = script(tmp_path / f"{name}.txt", str(EXAMPLES / name), str(tmp_path), folder=tmp_path)
        said = process.wait(280)
        assert process.returncode == 0, said
        for part in parts:
            assert part in said, said
