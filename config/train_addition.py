# Learns to add two numbers of three digits, from a tenth of all sums (python prepare.py addition).
out_dir = "out/addition"
dataset = "addition"
data_order = "epoch"
gradient_accumulation_steps = 1

# 0.4M parameters, a minute or two on a CPU core; a row holds one sum
n_layer = 2
n_head = 4
n_embd = 128
block_size = 15
batch_size = 64

max_iters = 2500
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 50
beta2 = 0.99

eval_interval = 500
eval_iters = 20
log_interval = 50
