"""Everything that a list names resolves: recipes, searches, tables, sources, models, transforms, tasks."""

import pytest

from spikefleet.cli.completion import recipe_names, search_names, table_names
from spikefleet.config.recipes import list_recipes, load_config
from spikefleet.reproduction.table import list_tables, load_table
from spikefleet.search import search_files
from spikefleet.search.search_files import list_searches, load_search
from spikefleet.tasks import task_class
from spikefleet_models.families import list_models, model_config
from spikefleet_pipelines.sources import find_source, list_sources
from spikefleet_tune.search_file import list_searches as all_searches


def test_recipes_resolve() -> None:
    assert recipe_names("") == list_recipes()
    for name in list_recipes():
        assert task_class(load_config(name).task)


@pytest.mark.parametrize("name", list_searches())
def test_searches_resolve_to_recipes_that_take_their_points(name: str) -> None:
    search = load_search(name)
    load_config(search.recipe, search.overrides)
    for point in search.space_view().points(corners=True, look_at=3):
        load_config(search.recipe, {**search.overrides, **point})


def test_a_search_without_its_recipe_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    to_come = {search for search in all_searches() if load_search(search).recipe not in list_recipes()}
    assert set(list_searches()) == set(all_searches()) - to_come
    assert search_names("") == list_searches()
    monkeypatch.setattr(search_files, "list_recipes", lambda: ["digits"])
    assert list_searches() == ["digits_t_gate_schedule"]
    recipes = [*list_recipes(), "gen1_spike_yolo_s", "saccade_scenes_spike_yolo"]
    monkeypatch.setattr(search_files, "list_recipes", lambda: recipes)
    assert list_searches() == all_searches()


def test_tables_resolve() -> None:
    assert table_names("") == list_tables()
    for name in list_tables():
        for group in load_table(name).groups:
            for scale in group.scales.values():
                load_config(scale.recipe)


def test_sources_resolve() -> None:
    for name in list_sources():
        source = find_source(name)
        assert callable(source.load_reader())
        assert source.options() is not None


def test_models_resolve() -> None:
    assert len(list_models()) > 10
    for name in list_models():
        assert model_config(name).task
