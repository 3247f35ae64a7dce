#!/bin/sh
# The same model at word problems in the manner of GSM8K, which are too hard for it: what a short run makes of that.
#
#     sh examples/real/words.sh [FOLDER] [SEED]
set -eu

here=$(dirname "$0")
out=${1:-runs/real}
seed=${2:-0}

[ -f "$out/model/model.safetensors" ] || python "$here/make_model.py" --output "$out/model"

# Held out: the problems of another seed
tether eval --model "$out/model" --task reasoning_gym:gsm_symbolic --problems.size 100 --problems.seed 1 --prompts.chat \
    --reward.functions numeric --reward.weights 0 1 --samples 2 --sampling.max-new-tokens 48 --seed "$seed" \
    --output "$out/words-before.json" --overwrite
tether ppo --config "$here/words.yaml" --model "$out/model" --output "$out/words" --overwrite --seed "$seed"
policy=$(ls -d "$out"/words/checkpoints/*/policy | tail -n 1)
tether eval --model "$policy" --task reasoning_gym:gsm_symbolic --problems.size 100 --problems.seed 1 --prompts.chat \
    --reward.functions numeric --reward.weights 0 1 --samples 2 --sampling.max-new-tokens 48 --seed "$seed" \
    --output "$out/words-after.json" --overwrite
