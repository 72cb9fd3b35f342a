"""Promise: the example in every loss's documentation runs and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from srpo_jax import losses

MODULES = [importlib.import_module(f"{losses.__name__}.{m.name}") for m in pkgutil.iter_modules(losses.__path__)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples_run(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "name", ["sft", "favourable_sft", "rejection_sft", "srpo", "rpo", "dpo", "ipo", "step_dpo", "orpo"]
)
def test_every_objective_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(losses, name))
