#!/bin/sh
# Teaches a small model to answer: first a language model of TEXT, then chats on top of it, then a question.
#
#     sh examples/chats/run.sh TEXT [OUT] [STEPS]
set -eu
here=$(dirname "$0")
text=$1 out=${2:-runs/chats} steps=${3:-300}

cllm train "$text" --out "$out/base" --embed-dim 64 --num-layers 2 --num-heads 4 --seq-len 128 --vocab-size 512 --steps "$steps"
cllm train "$here/chats.jsonl" --from "$out/base" --out "$out/chat" --steps "$steps" --batch-size 8 --learning-rate 1e-3
echo "What do owls eat?" | cllm chat "$out/chat" --system "You answer in a few words." --temperature 0 --max-tokens 20
