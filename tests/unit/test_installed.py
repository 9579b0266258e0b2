"""What is said where the trainer's packages are missing, too old, or don't go together."""

import importlib.metadata

import pytest

from gvpo_jax import installed
from gvpo_jax.errors import UserError

HERE = {name: importlib.metadata.version(name) for name in installed._asked_for()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"optax": None},
            r"without its trainer \(optax missing\): pip install -U 'gvpo-jax\[train",
        ),
        (
            dict.fromkeys(HERE),
            r"without its trainer \(chex, etils, flax and \d+ more missing\): pip",
        ),
        (
            {"jax": "0.7.2", "flax": "0.11.2"},
            r"needs flax 0.12.1 or newer \(here: 0.11.2\), jax 0.10 or newer \(here: 0.7.2\): pip "
            r"install -U 'gvpo-jax\[train\]'",
        ),
        ({"jax": "0.11.2", "flax": "0.12.9"}, "jax 0.11.2 does not work with flax 0.12.9: pip"),
        ({"jax": "0.11.2", "flax": "0.12.10"}, None),
        ({"jax": "99.0", "flax": "99.0.dev1"}, None),  # nobody knows, so nobody refuses
        ({"flax": "0.12.8-dirty-g1234", "jax": "0+untagged.1.g123", "optax": "unknown"}, None),
    ],
)
def test_what_is_installed_decides(changes, said, monkeypatch):
    def version(name):
        found = (HERE | changes)[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = installed.check_trainer.__wrapped__
    if said is None:
        check()
        return
    with pytest.raises(UserError, match=said) as error:
        check()
    assert isinstance(error.value, ImportError)


def test_the_extra_is_read_from_the_package():
    assert {"jax", "flax", "optax", "orbax-checkpoint", "transformers", "chex"} <= HERE.keys()
    assert installed._asked_for()["jax"] == "0.10"
