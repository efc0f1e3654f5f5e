"""`reward_experts`: rewards of capability experts, fused by category (DMoERM, arXiv 2403.01197).

    category   r = v_c . h                    phase 1, rows of category c
    point      r = (v_c + d_p) . h_p          phase 2, rows of point p; d_p = 0 at its start, so v_p begins as v_c
    fused      r = w_c . PReLU(U_c [h_1; ...; h_n] + b_c) + a_c     phase 3, rows of category c; h_j of its j-th point

h is the hidden state at the answer's last token. h_j is a pass of its own, in which every token goes to the expert of
the category's j-th point: the passes are rows of one batch. They are constants for phase 3; give its stage the dropout
0, or they are noisy. What is fused are hidden states, not the points' rewards, and all of a category's experts run.

Which expert a task has says the router `by_task`. `points`, in the order of the blocks of U, are kept with the run's
config. Loss and accuracy are those of `preference`: a pair's first answer is the better one.
B batch, S sequence, D width, G examples a row, C categories, P points, n most points of a category.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.errors import InputError
from molora_jax.objectives.preference import Preference

SLOPE = 0.25  # of a fresh PReLU


@dataclasses.dataclass(frozen=True)
class RewardExperts(Preference):
    """`points`: "category:task" for each point; the category's own rows are those of the task of its name. `form`: what
    a stage trains. Of a category without a further task its own rows may stand for a point's."""

    HEAD: ClassVar[bool] = True

    form: Literal["category", "point", "fused"] = "category"
    points: tuple = ()

    @property
    def needs_tokens(self):
        return False

    def check(self, where):
        super().check(where)
        wrong = [point for point in self.points if not isinstance(point, str) or len(_parts(point)) != 2]
        if wrong or not self.points or len(set(self.points)) < len(self.points):
            got = "none" if not self.points else f"{wrong[0]!r:.80}" if wrong else "one of them twice"
            raise InputError(
                f"{where}.points", got=got, expected='different texts "category:task"',
                fix='Write points=("chat:chat.empathy", "chat:chat.logic", "code:code.style").',
            )  # fmt: skip
        if self.reference != "none":
            raise InputError(f"{where}.reference", got=repr(self.reference), expected="'none': a reward has none")

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_parts(point)[0] for point in self.points))

    @property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """For each category the numbers of its points, in order."""
        own = [_parts(point)[0] for point in self.points]
        return tuple(tuple(i for i, c in enumerate(own) if c == category) for category in self.categories)

    @property
    def most(self) -> int:
        return max(map(len, self.slots))

    def init_heads(self, key, width, classes):
        C, n, keys = len(self.categories), self.most, jax.random.split(key, 4)
        bound = jnp.array([(len(own) * width) ** -0.5 for own in self.slots])  # torch's, of the inputs that there are
        uniform = lambda key, *shape: jax.random.uniform(key, shape, minval=-1.0)  # noqa: E731
        return {
            "kernel": 0.02 * jax.random.normal(keys[0], (C, width)),
            "points": jnp.zeros((len(self.points), width)),
            "fuse_U": uniform(keys[1], C, n, width, width) * bound[:, None, None, None],
            "fuse_b": uniform(keys[2], C, width) * bound[:, None],
            "fuse_slope": jnp.full(C, SLOPE),
            "fuse_w": uniform(keys[3], C, width) * width**-0.5,
            "fuse_a": jnp.zeros(C),
        }

    def tables(self, tasks: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By task id its category `[tasks]` and its point `[tasks]`, -1 for none; of each category's j-th point the
        task `[C, n]`, -1 beyond its last.

        Raises:
          InputError: a point whose task is none of these, a task without a category.
        """
        category, point = np.full(len(tasks), -1), np.full(len(tasks), -1)
        of_slot = np.full((len(self.categories), self.most), -1)
        for c, own in enumerate(self.slots):
            for j, p in enumerate(own):
                name = _parts(self.points[p])[1]
                if name not in tasks:
                    raise InputError(
                        "objective.points", got=f"{self.points[p]!r}, a point without rows",
                        expected=f"tasks among {', '.join(tasks)[:200]}", fix="Add its rows to data.tasks.",
                    )  # fmt: skip
                of_slot[c, j] = tasks.index(name)
                category[of_slot[c, j]], point[of_slot[c, j]] = c, p
        for c, name in enumerate(self.categories):
            if name in tasks:
                category[tasks.index(name)] = c
        if (category < 0).any():
            raise InputError(
                "data.tasks", got=f"{tasks[int(np.argmin(category))]!r}, of no category",
                expected=f"categories of objective.points ({', '.join(self.categories)}) and their points' tasks",
            )  # fmt: skip
        return category, point, of_slot

    def scores(self, forward, heads, fixed, batch, last):
        category, point, of_slot = map(jnp.asarray, self.tables(forward.model.tasks))
        task = jnp.take_along_axis(batch["task_ids"], last, axis=1)
        c = category[task]
        if self.form == "fused":
            return self.fused(heads, self.experts(forward, batch, last, category, of_slot), c)
        h = _at(forward.hidden(batch), last)
        v = heads["kernel"][c]
        if self.form == "point":
            own = point[task]
            v = v + jnp.where((own >= 0)[..., None], heads["points"][jnp.maximum(own, 0)], 0.0)
        return jnp.sum(h * v, axis=-1)

    def experts(self, forward, batch, last, category, of_slot):
        """`[B, G, n, D]`: hidden states of the points of each example's category, 0 beyond its last."""
        n, of_token = self.most, of_slot[category[batch["task_ids"]]]  # [B, S, n]
        there = jnp.where(of_token < 0, of_token[..., :1], of_token)  # an absent point's pass repeats the first one's
        tiled = {name: jnp.concatenate([x] * n) for name, x in batch.items()}
        tiled["task_ids"] = jnp.concatenate(jnp.split(there, n, axis=-1))[..., 0].astype(batch["task_ids"].dtype)
        hidden = jax.lax.stop_gradient(forward.hidden(tiled))
        h = jnp.stack([_at(part, last) for part in jnp.split(hidden, n)], axis=2)
        absent = jnp.take_along_axis(of_token, last[..., None], axis=1) < 0
        return jnp.where(absent[..., None], 0.0, h)

    @staticmethod
    def fused(heads, h, category):
        """`h [B, G, n, D]`, `category [B, G]` -> `[B, G]`."""
        z = jnp.einsum("bgnd,cnde->bgce", h, heads["fuse_U"]) + heads["fuse_b"]
        z = jnp.where(z > 0, z, heads["fuse_slope"][:, None] * z)
        r = jnp.sum(z * heads["fuse_w"], axis=-1) + heads["fuse_a"]
        return jnp.take_along_axis(r, category[..., None], axis=-1)[..., 0]

    def score(self, forward, heads, fixed, batch):
        if self.form != "fused":
            return super().score(forward, heads, fixed, batch)

        def one_by_one(tiled):
            """The passes one after the other, and the category's own, whose gates are reported."""
            parts = zip(*(jnp.split(x, self.most) for x in tiled.values()), strict=True)
            out = [forward.hidden(dict(zip(tiled, part, strict=True))) for part in parts]
            forward.hidden(batch)
            return jnp.concatenate(out)

        return super().score(dataclasses.replace(forward, hidden=one_by_one), heads, fixed, batch)


def _parts(point: str) -> list[str]:
    return [part.strip() for part in point.split(":", 1) if part.strip()]


def _at(hidden, last):
    """`[B, S, D]` at the positions `last [B, G]`, float32."""
    return jnp.take_along_axis(hidden.astype(jnp.float32), last[..., None], axis=1)
