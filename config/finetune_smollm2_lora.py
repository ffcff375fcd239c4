# Tune an adapter (LoRA) of SmolLM2-135M-Instruct, a small chat model, on conversations, on one CPU core.
#   python prepare.py plays_chat --tokenizer=smollm2
#   python train.py config/finetune_smollm2_lora.py
# With conversations of your own: python prepare.py mychats.jsonl --tokenizer=smollm2 --name=mine, and
# --dataset=mine --out_dir=out/mine. What it needs, before it is trained: --show=2.
out_dir = "out/smollm2_lora"
dataset = "plays_chat_smollm2"
init_from = "smollm2"
lora_rank = 8
data_order = "epoch"

# its own longest context is 8,192 tokens; a row of 256 holds a few short conversations
block_size = 256
batch_size = 1
gradient_accumulation_steps = 1  # 256 tokens a step

max_iters = 200
learning_rate = 2e-3  # far more than for all weights
schedule = "linear"
min_lr = 0.0
warmup_iters = 5
weight_decay = 0.0
beta2 = 0.99

eval_interval = 100
eval_iters = 20
log_interval = 5
always_save_checkpoint = False  # best.pt is the one to keep
