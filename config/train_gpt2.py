# GPT-2 124M on OpenWebText: nanoGPT's recipe. On one machine with 8 GPUs:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
wandb_log = False  # metrics.jsonl has the same numbers
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences x 1024 tokens x 40 micro-batches (5 on each of 8 GPUs) = 491,520 tokens a step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 steps = 295 billion tokens
max_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
