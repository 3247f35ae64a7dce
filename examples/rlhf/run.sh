#!/bin/sh
# The whole road: demonstrations → fine-tuned model → comparisons → reward model → PPO → report, and once more with a
# reward model that is too small, to see one that is fooled.
#
#     sh examples/rlhf/run.sh [FOLDER] [SEED]
set -eu

here=$(dirname "$0")
out=${1:-runs/cafe}
seed=${2:-0}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the models are small: one thread each is fastest

# 1. The world: texts, prompts, models that know nothing yet
python "$here/make_data.py" "$out" --seed "$seed"

# 2. A model that writes as the demonstrations do
tether sft --model "$out/base" --data "$out/demonstrations.jsonl" --output "$out/sft" --overwrite --seed "$seed" \
    --epochs 3 --batch-size 64 --learning-rate 3e-3 --adam-beta2 0.98 --warmup-steps 20

# 3. Its responses, two by two before the annotator
tether generate --model "$out/sft/policy" --prompts.path "$out/prompts.jsonl" --samples 256 --seed "$seed" \
    --sampling.max-new-tokens 32 --sampling.batch-size 1024 --output "$out/responses.jsonl" --overwrite
tether generate --model "$out/sft/policy" --prompts.path "$out/held_out.jsonl" --samples 192 --seed "$((seed + 1))" \
    --sampling.max-new-tokens 32 --sampling.batch-size 1024 --output "$out/sft_held_out.jsonl" --overwrite
python "$here/annotator.py" "$out/responses.jsonl" "$out/comparisons.jsonl" --seed "$seed"
python "$here/annotator.py" "$out/sft_held_out.jsonl" "$out/comparisons_held_out.jsonl" --seed "$((seed + 1))"

# 4. A reward model, compared with the Bayes rate on orders that it has not seen
tether reward --model "$out/sft/policy" --preferences.path "$out/comparisons.jsonl" --preferences.duplicates keep \
    --eval-data "$out/comparisons_held_out.jsonl" --output "$out/reward" --overwrite --seed "$seed" \
    --epochs 3 --batch-size 64 --learning-rate 3e-3 --adam-beta2 0.98 --warmup-steps 20

# 5. PPO against it, held near the most that best-of-16 can have: log 16 − 15/16 = 1.835 nats
tether ppo --model "$out/sft/policy" --prompts.path "$out/prompts.jsonl" --output "$out/ppo" --overwrite --seed "$seed" \
    --reward.functions "reward_model?path=$out/reward/model" --gold.functions "$here/annotator.py:utility" \
    --sampling.max-new-tokens 32 --collect.prompts 512 --iterations 60 --checkpoint-every 60 \
    --kl.beta 0.5 --kl.target 1.75 --kl.horizon 4000 --advantage.lam 1 \
    --learner.epochs 2 --learner.learning-rate 5e-4 --learner.value-learning-rate 3e-3 --learner.schedule linear
tether report "$out/ppo"

# 6. Is it better than the best of 16? On orders that nothing was trained on, by the annotator's own utility
policy=$(ls -d "$out"/ppo/checkpoints/*/policy | tail -n 1)
tether generate --model "$policy" --prompts.path "$out/held_out.jsonl" --samples 48 --seed "$seed" \
    --sampling.max-new-tokens 32 --sampling.batch-size 1024 --output "$out/ppo_held_out.jsonl" --overwrite
tether score --model "$out/reward/model" --data "$out/sft_held_out.jsonl" --output "$out/sft_scored.jsonl" --overwrite
tether score --model "$out/reward/model" --data "$out/ppo_held_out.jsonl" --output "$out/ppo_scored.jsonl" --overwrite
python "$here/compare.py" --reference "$out/sft/policy" --samples "$out/sft_scored.jsonl" --policy "$out/ppo_scored.jsonl" \
    --output "$out/comparison.json"

# 7. The same against a reward model that is too small, with a loose tether: what it praises, it gets
tether reward --model "$out/tiny" --preferences.path "$out/comparisons.jsonl" --preferences.duplicates keep \
    --eval-data "$out/comparisons_held_out.jsonl" --output "$out/small_reward" --overwrite --seed "$seed" \
    --max-steps 60 --batch-size 64 --learning-rate 5e-3 --adam-beta2 0.98
tether ppo --model "$out/sft/policy" --prompts.path "$out/prompts.jsonl" --output "$out/fooled" --overwrite --seed "$seed" \
    --reward.functions "reward_model?path=$out/small_reward/model" --gold.functions "$here/annotator.py:utility" \
    --sampling.max-new-tokens 32 --collect.prompts 128 --iterations 40 --checkpoint-every 40 --kl.beta 0.02 \
    --advantage.lam 1 --learner.epochs 2 --learner.learning-rate 5e-4 --learner.value-learning-rate 3e-3
tether report "$out/fooled"
