"""(IA)3: trained vectors scale keys, values and the input of the down projection (Liu et al. 2022, arXiv 2205.05638).

    python -m launch.train --config=configs/ia3.py --workdir=runs/ia3

The claim: a few vectors a layer, the fewest parameters of all these methods, do better than in-context examples. They
want a high learning rate, 3e-3 in the paper. peft has the same sites for Llama.

With experts (`experts="4"` and a router) each has vectors of its own: a mixture of vectors.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.method.rules = dict(all=common.rule("k,v,down", adapter=dict(name="ia3")))
    config.optim.learning_rate = 3e-3
    return config
