"""EWC on a LoRA: tasks one after the other, a parabola around what each of them needed (Kirkpatrick et al. 2017).

    python -m launch.train --config=configs/ewc_lora.py --workdir=runs/ewc_lora

    L = L_task + weight / 2 sum_j F_j (theta_j - a_j)^2

F is the diagonal of the empirical Fisher information of the tasks before, on `fisher_rows` of their training rows; the
factors A and B are the parameters (not their product). `configs/sequential_lora.py` is the same without it.
"""

from configs import sequential_lora


def get_config():
    config = sequential_lora.get_config()
    config.losses = dict(ewc=dict(weight=1e3))
    return config
