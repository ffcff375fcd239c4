# A character-level GPT on Shakespeare's plays (python prepare.py plays), sized by what it runs on.
import torch

out_dir = "out/plays_char"
dataset = "plays"
gradient_accumulation_steps = 1
warmup_iters = 100
beta2 = 0.99
log_interval = 10

if torch.cuda.is_available():  # 10.7M parameters
    n_layer = 6
    n_head = 6
    n_embd = 384
    dropout = 0.2
    block_size = 256
    batch_size = 64
    max_iters = 5000
    learning_rate = 1e-3
    min_lr = 1e-4
    eval_interval = 500
else:  # 0.8M parameters, a minute or two on two CPU cores
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 64
    batch_size = 32
    max_iters = 1200
    learning_rate = 6e-3  # a small model in a short run learns best with a high rate
    min_lr = 1e-4
    eval_interval = 300
    eval_iters = 30
