"""What a run starts from: a state of arrays, or what makes one of z; models that are neither are refused by name."""

from typing import Any

import jax

from metagradient.errors import StructureError
from metagradient.metaparameters import check_concrete
from metagradient.step.explain import Call, explained
from metagradient.trees import PyTree, is_floating, paths, strong

_NNX, _EQUINOX = "flax.nnx", "equinox"
_MODELS = _NNX, "flax.linen", "haiku", "torch.nn"
_SPLIT = "give the arrays alone, graph, params, rest = nnx.split(model, nnx.Param, ...), and nnx.merge in the loss"
_PARTITION = "give the arrays alone, params, static = eqx.partition(model, eqx.is_array), and eqx.combine in the loss"


def is_function(init: Any) -> bool:
    """Whether `init` is `z -> state`, and not a pytree that happens to be callable (an equinox module)."""
    leaves = jax.tree.leaves(init)
    return callable(init) and len(leaves) == 1 and leaves[0] is init


def started(init: Any, z: PyTree, calls: tuple[Call, ...] = ()) -> PyTree:
    """What `init` gives: itself, or what it makes of z.

    Arguments:
        calls: other functions of the user's that it may call, as in `explained`.
    """
    if not is_function(init):
        return init
    if _holds(init, *_MODELS):
        raise StructureError(f"init is a {type(init).__name__} itself: {_remedy(init)}, or a function of z")
    with explained(Call("init function", init, ("z",)), *calls):
        return init(z)


def arrays(name: str, tree: PyTree) -> PyTree:
    """`tree` with every leaf a strongly typed jax array; `StructureError` for a leaf that is none."""

    def convert(path: Any, leaf: Any) -> jax.Array:
        try:
            return strong(leaf)
        except (TypeError, ValueError, OverflowError) as error:
            # In a pass backwards, what its caller traces can't be calculated with.
            check_concrete(f"{name}{jax.tree_util.keystr(path)}", leaf)
            what = "a function" if callable(leaf) else f"{leaf!r:.80}"
            raise StructureError(
                f"{name}{jax.tree_util.keystr(path)} is {what}, not an array of numbers: {_remedy(tree, leaf)}"
            ) from error

    return jax.tree.map_with_path(convert, tree)


def check_parameters(params: PyTree) -> None:
    """Raise `StructureError` for parameters that are none, or a model with counters and keys among them."""
    if not jax.tree.leaves(params):
        raise StructureError(f"params hold no array: {params!r}. Give a pytree of floating arrays")
    fixed = next((f"{path} is {leaf.dtype}" for path, leaf in paths(params) if not is_floating(leaf)), None)
    if fixed and _holds(params, _NNX):
        raise StructureError(f"params hold what isn't floating ({fixed}): {_SPLIT}")


def _holds(tree: PyTree, *packages: str) -> bool:
    """Whether a tree holds an object whose class comes from one of some packages."""

    def comes(x: Any) -> bool:
        return any(f"{cls.__module__}.".startswith(f"{name}.") for cls in type(x).__mro__ for name in packages)

    return any(comes(x) for x in jax.tree.leaves(tree, is_leaf=comes))


def _remedy(tree: PyTree, leaf: Any = None) -> str:
    if _holds(tree, _NNX):
        return _SPLIT
    if _holds(tree, *_MODELS):
        return "give the parameters that it was initialised with (model.init(key, x))"
    if _holds(tree, _EQUINOX) or callable(leaf):
        return _PARTITION
    return "keep names and settings outside, where the loss finds them"
