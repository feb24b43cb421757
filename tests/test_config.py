"""Recipes and settings: overrides, errors in words, one default everywhere."""

import inspect

import pytest

from coterie import config
from coterie.errors import BadConfiguration


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_reach_the_settings_as_yaml(tmp_path):
    path = recipe(tmp_path, "name: mine\ncluster: {coteries: 3}\n")
    made = config.load_recipe(path, ["cluster.coteries=auto", "ingest.source=[a.jsonl, b.jsonl]", "embed.style=false"])
    assert made.cluster.coteries == "auto"
    assert made.ingest.source == ["a.jsonl", "b.jsonl"]
    assert made.embed.style is False


def test_a_single_source_is_a_list_of_one(tmp_path):
    assert config.load_recipe(recipe(tmp_path, ""), ["ingest.source=a.jsonl"]).ingest.source == ["a.jsonl"]


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        ("cluster: {coterie: 3}", None, "cluster.coterie: there is no such setting"),
        ("cluster: {coteries: many}", None, "cluster.coteries"),
        ("cluster: {replicates: 19}", None, "cluster.replicates: .* smallest p-value of 19 draws is 0.05"),
        ("ingest: {max_refused: 2}", None, "ingest.max_refused"),
        ("[1, 2]", None, "a recipe is a mapping"),
        ("a: [", None, "not YAML"),
        ("", "cluster.coteries", "write it as stage.field=value"),
        ("name: mine", "name.x=1", "name is a value, not a section"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_place(tmp_path, text, override, words):
    with pytest.raises(BadConfiguration, match=words.replace("[", r"\[")):
        config.load_recipe(recipe(tmp_path, text), [override] if override else [])


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(BadConfiguration, match="no such recipe"):
        config.load_recipe(tmp_path / "absent.yaml")


def test_numbers_given_as_text_are_numbers():
    assert config.ClusterSettings.of(coteries="3").coteries == 3
    assert config.RewardSettings.of(precision="2.5").precision == 2.5


def test_the_pipeline_has_every_setting_with_its_default():
    from pipelines.coteries import coteries

    parameters = inspect.signature(coteries.pipeline_func).parameters
    expected = {"title": config.Recipe().title}
    for stage, settings in config.Recipe():
        if isinstance(settings, config.Settings):
            expected |= {f"{stage}_{field}": value for field, value in settings.model_dump().items()}
    assert {name: p.default for name, p in parameters.items()} == expected


def test_recipe_arguments_are_parameters_of_the_pipeline():
    from pipelines.coteries import coteries

    made = config.Recipe(cluster={"coteries": 3}, ingest={"seed": 7})
    assert made.arguments() == {"cluster_coteries": 3, "ingest_seed": 7}
    assert made.arguments().keys() <= inspect.signature(coteries.pipeline_func).parameters.keys()


def test_the_recipes_of_the_project_load():
    from pathlib import Path

    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert {config.load_recipe(path).name for path in recipes} >= {"quickstart", "tldr", "ukp"}
