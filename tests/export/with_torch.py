"""Run where torch is: reads exported folders and writes the logits that the foreign program gives.

    python tests/export/with_torch.py JOBS.json OUT.npz

JOBS: [{"name", "kind": peft | molora | merged | mixlora, "base": a Hugging Face folder, "out", "ids"}, ...].
"""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def base(job):
    return transformers.AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32).eval()


def peft(job):
    import peft as library

    model = base(job)
    model.config.use_cache = False  # X-LoRA insists
    return library.PeftModel.from_pretrained(model, job["out"]).eval()


def molora(job):
    spec = importlib.util.spec_from_file_location("molora_torch", pathlib.Path(job["out"]) / "molora_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(base(job), job["out"])


def merged(job):
    return transformers.AutoModelForCausalLM.from_pretrained(job["out"], dtype=torch.float32).eval()


def mixlora(job):
    from mixlora.config import MixLoraConfig
    from mixlora.model import inject_adapter_in_model
    from safetensors.torch import load_file

    folder, model = pathlib.Path(job["out"]), base(job)
    config = MixLoraConfig.from_config(json.loads((folder / "adapter_config.json").read_text()))
    config.adapter_name_, config.dtype_ = "default", torch.float32
    inject_adapter_in_model(model, config.check(), load_file(folder / "adapter_model.safetensors"))
    return model.eval()


def main(jobs, out):
    found = {}
    for job in json.loads(pathlib.Path(jobs).read_text()):
        with torch.no_grad():
            model = globals()[job["kind"]](job)
            found[job["name"]] = model(torch.tensor([job["ids"]])).logits[0].float().numpy()
            if job.get("steps"):  # a cached pass: the last tokens one by one
                ids, n = job["ids"], len(job["ids"]) - job["steps"]
                seen = model(torch.tensor([ids[:n]]), use_cache=True)
                name = "cache" if hasattr(seen, "cache") else "past_key_values"  # its name before transformers 5.24
                parts = [seen.logits[0]]
                for token in ids[n:]:
                    seen = model(torch.tensor([[token]]), use_cache=True, **{name: getattr(seen, name)})
                    parts.append(seen.logits[0])
                found[f"{job['name']}/cached"] = torch.cat(parts).float().numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
