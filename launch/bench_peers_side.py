"""The side of `launch.bench_peers` that is peft: reads its options, then answers `start`, `step`, `end` with JSON."""

import json
import os
import resource
import sys
import warnings


def main():
    message = json.loads(sys.stdin.readline())
    peer, args = message["config"], message["args"]
    answers, sys.stdout = sys.stdout, sys.stderr
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args["threads"]])
    from launch.bench_side import timed

    work = None
    for line in sys.stdin:
        what = json.loads(line)
        if what == "start":
            work, answer = start(peer, args)
            work()  # a second warm-up, unmeasured
        elif what == "step":
            answer = timed(work)
        else:
            answer = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        print(json.dumps(answer), file=answers, flush=True)


def start(peer, args):
    """`(work, answer)`: work() does one step and returns 1; the batch is that of `launch.bench_side`."""
    import numpy as np
    import peft
    import torch
    import transformers

    warnings.simplefilter("ignore")  # what one of the three packages says about another
    torch.set_num_threads(args["threads"])
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, args["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(peer["folder"], dtype=dtype, attn_implementation="sdpa")
    sites = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = dict(r=peer["rank"], lora_alpha=peer["alpha"], lora_dropout=peer["dropout"], target_modules=sites)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peer["learning_rate"], weight_decay=0.0)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (args["batch"], args["seq"] + 1))
    tokens, targets = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())

    def work():
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, peer["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        work.loss = loss.item()
        return 1

    work()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return work, {"trainable": sum(p.numel() for p in trained), "loss": work.loss, "versions": versions}


if __name__ == "__main__":
    main()
