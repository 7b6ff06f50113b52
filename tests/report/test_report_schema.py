import copy

import ml_collections
import numpy as np
import pytest
from fake_saerl import saerl_data

from jaxrl_llm.errors import UserError
from jaxrl_llm.report import validate

MINIMAL = {"title": "t", "headline": "h"}


def place(data, path):
    """The container and the last key of a path such as ("curves", 0, "title")."""
    for key in path[:-1]:
        data = data[key]
    return data, path[-1]


def written(path):
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
    return text.lstrip(".")


def test_the_full_fixture_fits_and_becomes_plain():
    data = validate(saerl_data(prompts=50))
    assert isinstance(data["prompt_map"]["x"], list)
    assert isinstance(data["schedules"][0]["counts"][0][0], int)


@pytest.mark.parametrize(
    "path",
    [
        ("title",),
        ("headline",),
        ("curves", 0, "series", 1, "mean"),
        ("curves", 0, "target", "steps"),
        ("arms_tables", 0, "rows", 0, "accuracy"),
        ("arms_tables", 0, "rows", 1, "difference", "value"),
        ("prompt_map", "fields"),
        ("quality", "cut"),
        ("calibration", "series", 0, "bins", 3, "count"),
        ("signals", 2, "metric"),
        ("rollouts", 0, "responses", 0, "status"),
        ("features", 0, "contexts", 0, "activations"),
    ],
)
def test_a_missing_key_is_named_with_its_place(path):
    data = copy.deepcopy(validate(saerl_data(prompts=20)))
    container, key = place(data, path)
    del container[key]
    with pytest.raises(UserError, match="is missing") as error:
        validate(data)
    assert f" {written(path)} is missing" in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("facst",), [], "did you mean facts"),
        (("arms", 0, "role"), "boss", "must be one of 'baseline'"),
        (("quality", "cut"), "low", "must be a finite number, not the text 'low'"),
        (("quality", "cut"), float("nan"), "quality.cut must be a finite number, not None"),
        (("curves",), {}, "must be a list, not a dict"),
        (("arms_tables", 0, "rows", 0, "seeds"), 2.5, "must be a whole number"),
        (("curves", 0, "series", 0, "mean"), [0.1], r"curves\[0\].series\[0\].mean has 1 entries, but steps has 13"),
        (("prompt_map", "prompts"), ["one"], "prompt_map.prompts has 1 entries, but x has 20"),
        (("prompt_map", "fields", 1, "values"), ["one"], r"prompt_map.fields\[1\].values has 1"),
        (("signals", 0, "rows", 0, "cells"), [None], "has 1 entries, but columns has 3"),
        (("tables",), [{"title": "t", "metric": "m", "columns": ["a"], "rows": [{"name": "n", "cells": []}]}], r"tables\[0\].rows\[0\].cells has 0"),
        (("schedules", 0, "quantiles", "50"), [0.5], r"schedules\[0\].quantiles.50 has 1 entries"),
        (("schedules", 0, "clusters"), ["a"], r"counts\[0\] has 16 entries, but clusters has 1"),
        (("rollouts", 2, "responses", 0, "arm"), "nobody", "which is not in arms"),
        (("arms", 1, "name"), "vanilla", "the same name twice"),
        (("left_out",), {"mapp": "none"}, "left_out.mapp is not a section"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(path, value, message):
    data = copy.deepcopy(validate(saerl_data(prompts=20)))
    container, key = place(data, path)
    container[key] = value
    with pytest.raises(UserError, match=message):
        validate(data)


def test_nan_becomes_a_gap_and_booleans_are_no_numbers():
    series = {"arm": "a", "steps": [0, 1], "mean": np.array([0.5, np.nan])}
    data = validate(MINIMAL | {"curves": [{"title": "c", "series": [series]}]})
    assert data["curves"][0]["series"][0]["mean"] == [0.5, None]
    with pytest.raises(UserError, match="must be a finite number, not True"):
        validate(MINIMAL | {"curves": [{"title": "c", "series": [series | {"steps": [True, 1]}]}]})


def test_labels_are_free_where_the_page_has_no_arms():
    series = {"arm": "any set", "steps": [0], "mean": [0.5]}
    assert validate(MINIMAL | {"curves": [{"title": "c", "series": [series]}]})


def test_a_config_dict_is_welcome():
    assert validate(MINIMAL | {"config": ml_collections.ConfigDict({"a": {"b": (1, 2)}})})["config"] == {"a": {"b": [1, 2]}}
