"""Many trainings at once: each is the training that it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import batches, digit_loss, every_kind, mlp

import metagradient as mg
from metagradient.data.images import Images
from metagradient.errors import StructureError
from metagradient.tasks.classifier import Classifier, Recipe, interpolated, one_cycle

pytestmark = [pytest.mark.core, pytest.mark.optimised]


@pytest.fixture
def training() -> mg.Training:
    import optax

    return mg.Training.from_loss(digit_loss, optax.adam(0.1, eps_root=1e-8), mlp(np.float32), batches(dtype=np.float32))


@pytest.mark.parametrize("at_once", [None, 1, 2, 3])
def test_each_of_many_is_the_training_alone(training, at_once):
    z = every_kind(np.float32)
    zs = [jax.tree.map(lambda x, i=i: x * (1 + 0.3 * i), z) for i in range(3)]
    for z, found in zip(zs, mg.train_many(training, zs, at_once=at_once), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, mg.train(training, z))


def test_many_of_another_structure_are_refused(training):
    z = every_kind(np.float32)
    with pytest.raises(StructureError, match=r"zs\[1\]"):
        mg.train_many(training, [z, {**z, "more": jnp.ones(())}])
    with pytest.raises(StructureError, match="at least one"):
        mg.train_many(training, [])


def small() -> tuple[Classifier, Images]:
    from metagradient.data.images import load_digits

    classifier = Classifier(Recipe(widths=(4, 4), batch=32, steps=6), 10, 1)
    return classifier, classifier.fitted(load_digits().take(np.arange(96)))


def test_a_schedule_as_metaparameter_is_the_recipes_own():
    classifier, images = small()
    training = classifier.training(images.images, images.labels, 0)
    rates = classifier.recipe.rates()
    own = mg.train(training, {})
    knots = {"log_knots": jnp.log(jnp.asarray(one_cycle(2, 1.0, 0.5, 0.3, 0.1)))}
    between = np.exp(np.asarray(interpolated(knots["log_knots"], np.arange(6), 6)))
    for z, other in (({"log_rate": mg.PerStep(jnp.log(rates))}, own),
                     (knots, mg.train(training, {"log_rate": mg.PerStep(jnp.log(jnp.asarray(between)))}))):  # fmt: skip
        found = mg.train(training, z)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found.params, other.params)
    assert between[0] != pytest.approx(between[-1])


def test_pixels_and_weights_reach_the_loss_and_have_gradients():
    classifier, images = small()
    training = classifier.training(images.images, images.labels, 0)
    z = {
        "weights": mg.PerExample(jnp.ones(96)),
        "pixels": mg.PerExample(jnp.zeros((3, *images.images.shape[1:])), rows=[1, 5, 40]),
    }
    _, grad = mg.value_and_metagrad(training, classifier.mean_loss(images))(z)
    assert np.all(np.any(np.asarray(grad["pixels"].value) != 0, axis=(1, 2, 3)))
    assert np.count_nonzero(grad["weights"].value) == 96
    state = mg.train(training, z)
    assert 0 < classifier.accuracy(state, images) <= 1
