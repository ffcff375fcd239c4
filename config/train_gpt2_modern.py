# A model of GPT-2's class with a modern shape and optimizer, on FineWeb-Edu; see docs/modern.md. It was not
# run at this size. On one machine with 8 GPUs:
#   python prepare.py fineweb_edu
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py
out_dir = "out/gpt2_modern"
dataset = "fineweb_edu"

# 162M parameters, 85M of them in the blocks
n_layer = 12
n_head = 6  # of 128 channels
n_embd = 768
n_inner = 2048  # 8/3 n_embd: with its gate, SwiGLU has as many weights as an MLP of 4 n_embd

# 64 sequences x 1024 tokens x 8 micro-batches (1 on each of 8 GPUs) = 524,288 tokens a step
batch_size = 64
block_size = 1024
gradient_accumulation_steps = 8

# 5,000 steps = 2.6 billion tokens, 16 for each parameter
max_iters = 5000
eval_interval = 250
eval_iters = 20
log_interval = 10

bias = False
norm = "rmsnorm"
positions = "rotary"
qk_norm = True
activation = "swiglu"
tied_head = False
zero_projections = True

optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 0.004  # AdamW's; smaller than for small models, as in nanochat
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0

schedule = "wsd"  # constant, then linear over the last 70% of the steps, to 2%
warmup_iters = 0
cooldown_iters = 0.7
min_lr = learning_rate / 50
