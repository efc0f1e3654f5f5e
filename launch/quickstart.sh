#!/usr/bin/env bash
# From a bare clone to a trained mixture: environment, base model, data, training, evaluation.
#
#     ./launch/quickstart.sh [--config.train.steps=N ...]
#
# Arguments go to the training. Run again, it resumes where it stopped, or goes straight to the evaluation.
set -euo pipefail
SECONDS=0
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

echo "train: runs/quickstart (MixLoRA on SmolLM2-135M, nine tasks)"
python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart "$@"
echo "evaluate: runs/quickstart (held-out items, before and after)"
python -m launch.evaluate --workdir=runs/quickstart
echo "quickstart: done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
