"""Where experts live on the mesh and how tokens meet them, one file an engine; `auto.py` chooses one by its bytes.

`Engine` is the static choice that a model carries; `project` and `feed_forward` take global arrays into it.
"""

from molora_jax.engines.base import ALONE, Engine
from molora_jax.engines.shard import ENGINES, feed_forward, project

__all__ = ["ALONE", "ENGINES", "Engine", "feed_forward", "project"]
