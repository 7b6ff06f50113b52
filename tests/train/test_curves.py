"""The first steps of `sft` and of every variant of configs/grpo.py: the golden curves, and that they go where they should."""

import json

import numpy as np
import pytest
import tiny_curves as curves

GOLDEN = json.loads(curves.GOLDEN.read_text())["curves"]


def test_every_variant_has_a_curve_of_its_own():
    assert set(GOLDEN) == {"sft", *curves.VARIANTS} and {len(values) for curve in GOLDEN.values() for values in curve.values()} == {curves.STEPS}
    assert len({tuple(curve["grad_norm"]) for curve in GOLDEN.values()}) == len(GOLDEN)


@pytest.mark.parametrize("recipe", ["sft", *curves.VARIANTS])
def test_the_curve_is_the_golden_one(recipe, tmp_path, repo):
    """Six steps, made by tests/train/tiny_curves.py; the last three see the rows of the first three again. What they log is documented."""
    found = curves.curve(recipe, tmp_path / "run")
    if recipe != "sft":
        told, lines = (repo / "docs" / "training.md").read_text(), (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert not {name for line in lines for name in json.loads(line) if f"`{name}`" not in told}
    assert set(found) == set(GOLDEN[recipe])
    for name, values in found.items():
        np.testing.assert_allclose(values, GOLDEN[recipe][name], rtol=2e-3, atol=2e-3, err_msg=name)
    name, rise = ("loss", -1.0) if recipe == "sft" else ("reward", 0.1)
    assert (np.mean(found[name][3:]) - np.mean(found[name][:3])) / rise > 1
