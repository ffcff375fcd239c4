# A character-level GPT on Shakespeare's plays, sized by what it runs on: about two minutes on two CPU cores.

out_dir = "out/plays_char"
dataset = "plays"
gradient_accumulation_steps = 1
log_interval = 10

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
max_iters = 2000
learning_rate = 1e-3
lr_decay_iters = 2000
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
eval_interval = 250
eval_iters = 20
