# Learns to add two numbers of three digits, from a tenth of all sums (python prepare.py addition).
out_dir = "out/addition"
dataset = "addition"
data_order = "epoch"
gradient_accumulation_steps = 1

# 0.4M parameters; a row holds one sum
n_layer = 2
n_head = 4
n_embd = 128
n_inner = 344
block_size = 15
batch_size = 64
norm = "rmsnorm"
positions = "rotary"
qk_norm = True
activation = "swiglu"
bias = False
tied_head = False
zero_projections = True
embedding_std = 0.1

max_iters = 1000
optimizer = "muon"
learning_rate = 8e-3
embedding_learning_rate = 2e-2
beta1 = 0.8
weight_decay = 0.0
schedule = "wsd"
warmup_iters = 0
cooldown_iters = 0.7
min_lr = 1.6e-4

eval_interval = 250
eval_iters = 20
log_interval = 50
