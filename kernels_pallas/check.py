"""What the arrays of one call must agree on. Only shapes and dtypes are read: a compiled program pays nothing."""

import jax.numpy as jnp


def agree(op: str, **arguments) -> dict[str, int]:
    """The size of every axis of `name=(array, "T K R")`.

    The first array that has an axis says its size; `1|E` may be 1 as well. An array that is None is left out.

    Raises:
      ValueError: an array has another number of axes, or another size than one before it; an axis other than T is
        empty; `idx` does not hold integers.
    """
    sizes, source = {}, {}
    for name, (array, axes) in arguments.items():
        if array is None:
            continue
        shape, letters = getattr(array, "shape", None) or jnp.shape(array), axes.split()
        got = f"{op}: {name} has shape {list(shape)}, expected [{', '.join(letters)}]"
        if len(shape) != len(letters):
            raise ValueError(f"{got}. Reshape it to {len(letters)} axes.")
        for letter, size in zip(letters, shape, strict=True):
            shared, _, letter = letter.rpartition("|")
            if shared and size == 1:
                continue
            known, first = sizes.setdefault(letter, size), source.setdefault(letter, name)
            if size != known:
                raise ValueError(
                    f"{got}: its {letter} is {size}, but {first}'s is {known}. Pass the {name} and {first} that belong "
                    f"together{f' (or one {name} for all: {letter} = 1)' if shared else ''}."
                )
            if size == 0 and letter != "T":
                raise ValueError(f"{got}: its {letter} is 0. Only T may be: leave the call out.")
        if name == "idx" and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{op}: idx is {array.dtype}, expected integers in [0, E]. Cast it to int32.")
    return sizes
