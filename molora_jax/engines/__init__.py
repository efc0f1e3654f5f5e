"""Where experts live on the mesh and how tokens meet them, one file an engine; `auto.py` chooses one by its bytes.

`Engine` is the static choice that a model carries; `project`, `feed_forward` and `beside` take global arrays into it.
"""

from molora_jax.engines.base import ALONE, ENGINES, Engine
from molora_jax.engines.shard import beside, feed_forward, meet, project

__all__ = ["ALONE", "ENGINES", "Engine", "beside", "feed_forward", "meet", "project"]
